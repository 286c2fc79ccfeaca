"""Rows that share, fork, grow and end: every row reads back its own tokens, whoever shares them."""

import hashlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moe_jax.cache.kv_rows import KvRows, SharedPrefix
from moe_jax.cache.paged_kv import PAGE_SIZE, pages_for

PAGES, ROWS = 12, 4
IDENTITY = hashlib.sha256(b"a model").digest()


def kv_rows(identity: bytes | None = IDENTITY) -> KvRows:
    return KvRows(PAGES, ROWS, identity)


def start(rows: KvRows, tokens: list[int]) -> tuple[int, SharedPrefix, int]:
    """A row that holds these tokens; returns also how many it did not have to write."""
    (row,) = rows.take(1)
    prefix = SharedPrefix()
    cached = rows.share(row, prefix, tokens)
    rows.grow({row: len(tokens) - cached})
    rows.list_pages([(row, prefix, tokens, len(tokens))])
    return row, prefix, cached


@pytest.mark.parametrize(
    "length, cached", [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32)], ids="{}".format
)
def test_the_same_tokens_share_full_pages_but_for_the_last_token(length, cached):
    rows = kv_rows()
    tokens = list(range(length))
    first, prefix, _ = start(rows, tokens)
    rows.give_back([first], prefix)
    assert rows.available == PAGES
    _, _, found = start(rows, tokens)
    assert found == cached


def test_without_an_identity_nothing_is_shared_or_kept():
    rows = kv_rows(None)
    for _ in range(2):
        row, prefix, cached = start(rows, list(range(40)))
        assert cached == 0
        rows.give_back([row], prefix)
        assert rows.violations() == []


def test_pages_in_use_by_one_are_shared_with_another():
    rows = kv_rows()
    tokens = list(range(40))
    one, _, _ = start(rows, tokens)
    other, _, cached = start(rows, [*tokens[:33], 7, 7])
    assert cached == 32
    assert rows.held([one, other]) == 3 + 1


def test_kept_pages_give_way_the_oldest_first():
    rows = kv_rows()
    texts = [[i] * 48 for i in range(4)]
    for text in texts:
        row, prefix, _ = start(rows, text)
        rows.give_back([row], prefix)
    # Twelve pages are kept; four more take those of the first text, and the second's last.
    row, prefix, _ = start(rows, [9] * 64)
    rows.give_back([row], prefix)
    found = []
    for text in reversed(texts):
        (row,), prefix = rows.take(1), SharedPrefix()
        found.append(rows.share(row, prefix, [*text, 1]))
        rows.give_back([row], prefix)
    assert found == [48, 48, 32, 0]


def test_growing_past_the_end_is_a_bug():
    rows = kv_rows()
    (row,) = rows.take(1)
    with pytest.raises(RuntimeError, match="the KV cache is 2 pages short; this is a bug"):
        (other,) = rows.take(1)
        rows.grow({row: PAGES * PAGE_SIZE - 20, other: 33})


class Machine(RuleBasedStateMachine):
    """What pages hold is followed token by token, and compared with what rows should hold."""

    def __init__(self):
        super().__init__()
        self.rows = kv_rows()
        self.content = np.full((PAGES, PAGE_SIZE), -1)
        self.texts: dict[int, list[int]] = {}
        self.prefixes: dict[int, SharedPrefix | None] = {}
        self.listed: dict[int, int] = {}

    def write(self, added: dict[int, list[int]]) -> bool:
        """Grows rows as the engine does: copies first, then the new tokens."""
        counts = {row: len(tokens) for row, tokens in added.items()}
        worst = sum(pages_for(n) + 1 for n in counts.values())
        if worst > self.rows.available:
            return False
        copies = self.rows.grow(counts)
        if copies is not None:
            for source, target in zip(copies.source, copies.target, strict=True):
                if target < PAGES:
                    self.content[target] = self.content[source]
        for row, tokens in added.items():
            for token in tokens:
                place = len(self.texts[row])
                page = self.rows.tables[row, place // PAGE_SIZE]
                self.content[page, place % PAGE_SIZE] = token
                self.texts[row].append(token)
        return True

    @precondition(lambda self: len(self.texts) < ROWS)
    @rule(first=st.integers(0, 2), length=st.integers(1, 50))
    def begin(self, first, length):
        tokens = [first] * length
        (row,) = self.rows.take(1)
        prefix = SharedPrefix()
        cached = self.rows.share(row, prefix, tokens)
        self.texts[row], self.prefixes[row] = tokens[:cached], prefix
        if not self.write({row: tokens[cached:]}):
            self.end(row)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), token=st.integers(0, 2), count=st.integers(1, 20))
    def go_on(self, data, token, count):
        rows = data.draw(st.sets(st.sampled_from(sorted(self.texts)), min_size=1))
        self.write({row: [token] * count for row in rows})

    @precondition(lambda self: self.texts)
    @rule()
    def list_pages(self):
        self.rows.list_pages(
            [
                (row, prefix, self.texts[row], len(self.texts[row]))
                for row, prefix in self.prefixes.items()
                if prefix is not None
            ]
        )

    @precondition(lambda self: self.texts and len(self.texts) < ROWS)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(sorted(self.texts)))
        (row,) = self.rows.take(1)
        self.rows.fork({row: parent})
        self.texts[row], self.prefixes[row] = list(self.texts[parent]), None

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), drop=st.integers(0, 10))
    def shorten(self, data, drop):
        """Only what nobody was told of: tokens after the listed pages."""
        row = data.draw(st.sampled_from(sorted(self.texts)))
        prefix = self.prefixes[row]
        least = prefix.used * PAGE_SIZE if prefix else 0
        length = max(least, len(self.texts[row]) - drop)
        self.rows.shorten({row: length})
        del self.texts[row][length:]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def give_back(self, data):
        self.end(data.draw(st.sampled_from(sorted(self.texts))))

    def end(self, row):
        self.rows.give_back([row], self.prefixes.pop(row))
        del self.texts[row]

    @invariant()
    def rows_read_their_own_tokens(self):
        for row, tokens in self.texts.items():
            table = self.rows.tables[row, : pages_for(len(tokens))]
            read = self.content[table].ravel()[: len(tokens)]
            assert read.tolist() == tokens

    @invariant()
    def nothing_is_wrong(self):
        assert self.rows.violations() == []

    def teardown(self):
        for row in list(self.texts):
            self.end(row)
        assert self.rows.available == PAGES
        assert self.rows.violations() == []


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)
