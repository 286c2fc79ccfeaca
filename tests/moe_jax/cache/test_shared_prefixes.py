"""Rows that share pages through the prefix index: each of them always reads its own tokens."""

import hashlib

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from moe_jax.cache.content_key import page_keys, root_key
from moe_jax.cache.page_pool import (
    adopt,
    append,
    empty_pool,
    fork,
    free_pages,
    hold,
    release,
    truncate,
    unhold,
    violations,
)
from moe_jax.cache.paged_kv import PAGE_SIZE
from moe_jax.cache.prefix_index import PrefixIndex

PAGES, ROWS, PAGES_PER_ROW = 10, 4, 4
NONE = PAGES
GARBAGE = -1
ROOT = root_key(hashlib.sha256(b"").digest())


def each_row(values):
    return st.tuples(*[values] * ROWS)


class SharedPrefixes(RuleBasedStateMachine):
    """What an engine does with pool and index. The content of a page is the tokens in it.

    A row's tokens count up from its flavour times 1000, which it may change as it grows, so that
    many rows share some pages.
    """

    def __init__(self):
        super().__init__()
        self.pool, self.index = empty_pool(PAGES, ROWS, PAGES_PER_ROW), PrefixIndex()
        self.content = np.full((PAGES, PAGE_SIZE), GARBAGE)
        self.rows = [[] for _ in range(ROWS)]  # tokens
        self.acquired = [[] for _ in range(ROWS)]  # keys
        self.listed = {}  # page -> its tokens

    def append(self, more):
        """Rows grow by these tokens, if there are pages or the index can give up some."""
        counts = np.array([len(tokens) for tokens in more])
        pool, copies, short = append(self.pool, counts)
        while short and self.index.idle:
            self.evict(int(short))
            pool, copies, short = append(self.pool, counts)
        if short:
            return
        self.pool = pool
        source, target = np.asarray(copies.source), np.asarray(copies.target)
        self.content[target[target < NONE]] = self.content[source[source < NONE]]
        tables, references = pool.block_tables, pool.references
        for row, tokens in enumerate(more):
            for token in tokens:
                page = tables[row, len(self.rows[row]) // PAGE_SIZE]
                assert references[page] == 1, "a page that others read is written"
                self.content[page, len(self.rows[row]) % PAGE_SIZE] = token
                self.rows[row] = [*self.rows[row], token]
            self.list_pages(row)

    def list_pages(self, row):
        """Lists the full pages of a row; it is a user of all their keys, whoever has the page."""
        keys, pages = page_keys(ROOT, self.rows[row]), self.pool.block_tables[row]
        for n in range(len(self.acquired[row]), len(keys)):
            page = int(pages[n])
            if self.index.insert(keys[n], keys[n - 1] if n else None, page):
                self.pool = hold(self.pool, np.array([page]))
                self.listed[page] = self.rows[row][n * PAGE_SIZE : (n + 1) * PAGE_SIZE]
            else:
                self.index.acquire([keys[n]])
        self.acquired[row] = keys

    def flavoured(self, row, flavour, count):
        first = len(self.rows[row])
        count = min(count, PAGES_PER_ROW * PAGE_SIZE - first)
        return [1000 * flavour + first + n for n in range(count)]

    @rule(row=st.integers(0, ROWS - 1), flavour=st.integers(0, 1), length=st.integers(1, 60))
    def start(self, row, flavour, length):
        if self.rows[row]:
            return
        prompt = self.flavoured(row, flavour, length)
        keys = page_keys(ROOT, prompt)[: (length - 1) // PAGE_SIZE]  # the last token is computed
        pages = self.index.match(keys)
        self.acquired[row] = keys[: len(pages)]
        self.index.acquire(self.acquired[row])
        padded = np.array(pages + [NONE] * (PAGES_PER_ROW - len(pages)))
        self.pool = adopt(self.pool, row, padded, len(pages))
        self.rows[row] = prompt[: len(pages) * PAGE_SIZE]
        self.append([prompt[len(self.rows[r]) :] if r == row else [] for r in range(ROWS)])

    @rule(counts=each_row(st.sampled_from([0, 1, 7, 16])), flavours=each_row(st.integers(0, 1)))
    def grow(self, counts, flavours):
        rows = zip(range(ROWS), flavours, counts, strict=True)
        self.append([self.flavoured(*row) if self.rows[row[0]] else [] for row in rows])

    @rule(parents=each_row(st.integers(0, ROWS)))
    def fork(self, parents):
        self.pool = fork(self.pool, np.array(parents))
        tokens, acquired = [*self.rows, []], [*self.acquired, []]
        for parent in parents:
            self.index.acquire(acquired[parent])
        for keys in self.acquired:
            self.index.release(keys)
        self.rows = [tokens[parent] for parent in parents]
        self.acquired = [acquired[parent] for parent in parents]

    @rule(drop=each_row(st.sampled_from([0, 0, 1, 3, 20])))
    def truncate(self, drop):
        lengths = [max(len(tokens) - n, 0) for tokens, n in zip(self.rows, drop, strict=True)]
        self.pool = truncate(self.pool, np.array(lengths))
        for row, length in enumerate(lengths):
            self.rows[row] = self.rows[row][:length]
            self.index.release(self.acquired[row][length // PAGE_SIZE :])
            self.acquired[row] = self.acquired[row][: length // PAGE_SIZE]

    @rule(gone=each_row(st.booleans()))
    def finish(self, gone):
        self.pool = release(self.pool, np.array(gone))
        for row in np.flatnonzero(gone):
            self.index.release(self.acquired[row])
            self.rows[row], self.acquired[row] = [], []

    @rule(count=st.integers(0, 3))
    def evict(self, count):
        self.give_back(self.index.evict(count))

    def give_back(self, pages):
        self.pool = unhold(self.pool, np.array(pages, np.int32))
        for page in pages:
            del self.listed[page]

    @invariant()
    def every_row_reads_its_own_tokens(self):
        assert violations(self.pool) == []
        assert self.index.violations() == []
        self.content[self.pool.references == 0] = GARBAGE
        tables = self.pool.block_tables
        assert self.pool.lengths.tolist() == [len(tokens) for tokens in self.rows]
        for row, tokens in enumerate(self.rows):
            own = self.content[tables[row, tables[row] < NONE]].ravel()[: len(tokens)]
            assert own.tolist() == tokens
        assert sorted(self.listed) == np.flatnonzero(self.pool.held).tolist()
        assert len(self.index) == len(self.listed)
        for page, tokens in self.listed.items():
            assert self.content[page].tolist() == tokens

    def teardown(self):
        self.finish([True] * ROWS)
        self.give_back(self.index.clear())
        assert free_pages(self.pool) == PAGES
        assert not self.pool.references.any()
        assert len(self.index) == self.index.idle == 0
        assert violations(self.pool) == self.index.violations() == []


TestSharedPrefixes = SharedPrefixes.TestCase
TestSharedPrefixes.settings = settings(max_examples=350, stateful_step_count=14)
