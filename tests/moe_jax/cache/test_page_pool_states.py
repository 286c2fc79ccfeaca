"""The page pool against a plain model of it, over random sequences of operations."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

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
from moe_jax.cache.paged_kv import PAGE_SIZE, pages_for

PAGES, ROWS, PAGES_PER_ROW = 10, 4, 4
NONE = PAGES


def each_row(values):
    return st.tuples(*[values] * ROWS)


class PlainPool:
    """What the pool promises: a list of pages per row, references found by counting."""

    def __init__(self):
        self.rows = {row: [] for row in range(ROWS)}
        self.lengths = dict.fromkeys(range(ROWS), 0)
        self.held = set()

    def references(self, page):
        return sum(page in row for row in self.rows.values()) + (page in self.held)

    def free(self):
        return [page for page in range(PAGES) if not self.references(page)]

    def append(self, counts):
        """Returns the copies (row, source, target), or how many pages are missing."""
        references = {page: self.references(page) for page in range(PAGES)}
        copying = []
        for row in reversed(range(ROWS)):  # so that the first is left alone with it
            if counts[row] and self.lengths[row] % PAGE_SIZE:
                page = self.rows[row][-1]
                if references[page] > 1:
                    references[page] -= 1
                    copying.append(row)
        needed = len(copying) + sum(
            pages_for(self.lengths[row] + counts[row]) - len(self.rows[row]) for row in range(ROWS)
        )
        free = self.free()
        if needed > len(free):
            return needed - len(free)
        copies = {}
        for row in range(ROWS):
            if row in copying:
                copies[row] = self.rows[row][-1], free.pop(0)
                self.rows[row] = [*self.rows[row][:-1], copies[row][1]]
            self.lengths[row] += counts[row]
            while len(self.rows[row]) < pages_for(self.lengths[row]):
                self.rows[row] = [*self.rows[row], free.pop(0)]
        return copies


class PoolMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool, self.plain = empty_pool(PAGES, ROWS, PAGES_PER_ROW), PlainPool()

    @rule(counts=each_row(st.sampled_from([0, 1, 3, 16, 17, 33])))
    def append(self, counts):
        room = [PAGES_PER_ROW * PAGE_SIZE - self.plain.lengths[row] for row in range(ROWS)]
        counts = [min(pair) for pair in zip(counts, room, strict=True)]
        self.pool, copies, short = append(self.pool, np.array(counts))
        expected = self.plain.append(counts)
        if isinstance(expected, int):
            assert int(short) == expected
            expected = {}
        else:
            assert int(short) == 0
        pairs = [expected.get(row, (NONE, NONE)) for row in range(ROWS)]
        assert np.stack([copies.source, copies.target], axis=1).tolist() == list(map(list, pairs))

    @rule(parents=each_row(st.integers(0, ROWS)))
    def fork(self, parents):
        self.pool = fork(self.pool, np.array(parents))
        rows, lengths = self.plain.rows | {ROWS: []}, self.plain.lengths | {ROWS: 0}
        self.plain.rows = {row: rows[parent] for row, parent in enumerate(parents)}
        self.plain.lengths = {row: lengths[parent] for row, parent in enumerate(parents)}

    @rule(gone=each_row(st.booleans()))
    def release(self, gone):
        self.pool = release(self.pool, np.array(gone))
        for row in np.flatnonzero(gone).tolist():
            self.plain.rows[row], self.plain.lengths[row] = [], 0

    @rule(row=st.integers(0, ROWS - 1), giver=st.integers(0, ROWS - 1), count=st.integers(0, 4))
    def adopt(self, row, giver, count):
        if self.plain.lengths[row]:
            return
        count = min(count, self.plain.lengths[giver] // PAGE_SIZE)
        pages = self.plain.rows[giver][:count]
        padded = np.array(pages + [NONE] * (PAGES_PER_ROW - count))
        self.pool = adopt(self.pool, row, padded, count)
        self.plain.rows[row], self.plain.lengths[row] = pages, count * PAGE_SIZE

    @rule(drop=each_row(st.sampled_from([0, 0, 1, 5, 16, 40])))
    def truncate(self, drop):
        lengths = [max(self.plain.lengths[row] - drop[row], 0) for row in range(ROWS)]
        self.pool = truncate(self.pool, np.array(lengths))
        for row, length in enumerate(lengths):
            self.plain.lengths[row] = length
            self.plain.rows[row] = self.plain.rows[row][: pages_for(length)]

    @rule(row=st.integers(0, ROWS - 1), count=st.integers(0, 4))
    def hold(self, row, count):
        full = self.plain.rows[row][: self.plain.lengths[row] // PAGE_SIZE]
        pages = [page for page in full if page not in self.plain.held][:count]
        self.pool = hold(self.pool, np.array([*pages, NONE]))
        self.plain.held |= set(pages)

    @rule(count=st.integers(0, 4))
    def unhold(self, count):
        pages = sorted(self.plain.held)[:count]
        self.pool = unhold(self.pool, np.array([NONE, *pages]))
        self.plain.held -= set(pages)

    @invariant()
    def agree(self):
        assert violations(self.pool) == []
        names = [self.plain.rows[row] for row in range(ROWS)]
        padded = [row + [NONE] * (PAGES_PER_ROW - len(row)) for row in names]
        assert self.pool.block_tables.tolist() == padded
        assert self.pool.lengths.tolist() == list(self.plain.lengths.values())
        assert set(np.flatnonzero(self.pool.held).tolist()) == self.plain.held
        counts = [self.plain.references(page) for page in range(PAGES)]
        assert self.pool.references.tolist() == counts
        assert free_pages(self.pool) == len(self.plain.free())

    def teardown(self):
        self.release([True] * ROWS)
        self.unhold(PAGES)
        assert not self.pool.references.any()
        assert violations(self.pool) == []


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=350, stateful_step_count=16)
