"""Who gets which page, what is refused, and what violations() finds."""

import dataclasses
import re

import numpy as np
import pytest

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

PAGES, ROWS, PAGES_PER_ROW = 8, 3, 4
NONE = PAGES


def array(*values):
    return np.array(values, np.int32)


def grown(pool, *counts):
    pool, _, short = append(pool, array(*counts))
    assert int(short) == 0
    return pool


def tables(pool):
    return [[page for page in row if page != NONE] for row in pool.block_tables]


def copied(copies):
    pairs = zip(np.asarray(copies.source).tolist(), np.asarray(copies.target).tolist(), strict=True)
    return [None if pair == (NONE, NONE) else pair for pair in pairs]


def empty():
    return empty_pool(PAGES, ROWS, PAGES_PER_ROW)


def beams():
    """Rows 0 and 1 share page 0 and the partly filled page 1; row 2 has page 2, which is held."""
    pool = fork(grown(empty(), 20, 0, 16), array(0, 0, 2))
    return hold(pool, array(2))


def test_the_lowest_free_pages_go_to_rows_in_order():
    pool = grown(empty(), 17, 0, 1)
    assert tables(pool) == [[0, 1], [], [2]]
    pool = release(pool, np.array([True, False, False]))
    pool = grown(pool, 0, 33, 16)
    assert tables(pool) == [[], [0, 1, 3], [2, 4]]
    assert pool.lengths.tolist() == [0, 33, 17]
    assert pool.references.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert free_pages(pool) == 3


def test_arrays_are_never_written_again():
    pool, _, _ = append(empty(), array(20, 0, 0))
    for after in (pool, truncate(pool, array(3, 0, 0)), fork(pool, array(0, 0, 0)), beams()):
        for values in vars(after).values():
            with pytest.raises(ValueError, match="read-only"):
                values[0] = values[-1]


@pytest.mark.parametrize(
    "counts, expected, after",
    [
        ((1, 0, 0), [(1, 3), None, None], [[0, 3], [0, 1], [2]]),
        ((0, 13, 0), [None, (1, 3), None], [[0, 1], [0, 3, 4], [2]]),
        ((1, 1, 1), [None, (1, 3), None], [[0, 1], [0, 3], [2, 4]]),
        ((0, 0, 1), [None, None, None], [[0, 1], [0, 1], [2, 3]]),
    ],
)
def test_a_shared_last_page_is_copied_and_the_first_of_its_last_users_keeps_it(
    counts, expected, after
):
    pool, copies, _ = append(beams(), array(*counts))
    assert copied(copies) == expected
    assert tables(pool) == after
    assert violations(pool) == []


def test_a_held_page_is_not_written_however_few_name_it():
    pool = truncate(hold(grown(empty(), 16, 0, 0), array(0)), array(15, 0, 0))
    pool, copies, _ = append(pool, array(1, 0, 0))
    assert copied(copies) == [(0, 1), None, None]
    assert tables(unhold(pool, array(0))) == [[1], [], []]


@pytest.mark.parametrize(
    "counts, missing", [((44, 44, 1), 1), ((44, 28, 48), 2), ((44, 44, 48), 3)]
)
def test_if_pages_are_missing_nothing_changes(counts, missing):
    before = beams()
    after, copies, short = append(before, array(*counts))
    assert int(short) == missing
    assert copied(copies) == [None] * ROWS
    assert after is before


def test_rows_grow_in_pages_of_their_own_without_a_new_table():
    before = grown(empty(), 17, 0, 1)
    pool, copies, short = append(before, array(15, 0, 3))
    assert pool.block_tables is before.block_tables
    assert (tables(pool), pool.lengths.tolist()) == ([[0, 1], [], [2]], [32, 0, 4])
    assert (copied(copies), short) == ([None] * ROWS, 0)
    assert violations(pool) == []


def test_a_fork_is_a_permutation_with_repeats():
    pool = grown(empty(), 20, 1, 40)
    pool = fork(pool, array(2, ROWS, 0))
    assert tables(pool) == [[3, 4, 5], [], [0, 1]]
    assert pool.references.tolist() == [1, 1, 0, 1, 1, 1, 0, 0]
    pool = fork(pool, array(0, 0, 0))
    assert pool.references.tolist() == [0, 0, 0, 3, 3, 3, 0, 0]
    assert pool.lengths.tolist() == [40] * 3


def test_pages_are_adopted_and_outlive_their_row_while_held():
    pool = release(beams(), np.array([False, False, True]))
    pool = adopt(pool, 2, array(2, 1, -5, 99), 1)
    assert tables(pool)[2] == [2]
    assert pool.lengths[2] == 16
    assert pool.references[2] == 2
    pool = unhold(hold(pool, array(NONE, 0)), array(NONE, 2, NONE))
    pool = release(pool, np.full(ROWS, True))
    assert pool.references.tolist() == [1] + [0] * 7


def test_dropped_tokens_give_their_pages_back():
    pool = truncate(beams(), array(17, 16, 0))
    assert tables(pool) == [[0, 1], [0], []]
    assert pool.references.tolist() == [2, 1, 1] + [0] * 5
    assert violations(pool) == []


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: append(p, array(0, -2, 0)), "row 1 cannot grow by -2 tokens to 18"),
        (lambda p: append(p, array(1, 45, 1)), "row 1 cannot grow by 45 tokens to 65: its block"),
        (lambda p: fork(p, array(0, 4, 0)), "parent 4 is not from 0 to 3 (the number of rows"),
        (lambda p: fork(p, array(0, 0, -1)), "parent -1 is not from 0 to 3"),
        (lambda p: adopt(p, 0, array(0, 1, 8, 8), 1), "row 0 is not an empty row of 3; release()"),
        (lambda p: adopt(p, 3, array(0, 1, 8, 8), 1), "row 3 is not an empty row of 3"),
        (lambda p: adopt(empty(), 0, array(0, 1, 8, 8), 5), "a row of 4 pages cannot adopt 5"),
        (lambda p: adopt(empty(), 0, array(3, 8, 8, 8), 1), "page 3 cannot be adopted: it is free"),
        (lambda p: adopt(empty(), 0, array(0, 8, 8, 8), 2), "must be from 0 to 7, got [0 8]"),
        (lambda p: truncate(p, array(20, 20, 17)), "row 2 of 16 tokens cannot be truncated to 17"),
        (lambda p: truncate(p, array(-1, 20, 16)), "row 0 of 20 tokens cannot be truncated to -1"),
        (lambda p: hold(p, array(0, 3)), "page 3 cannot be held: it is free"),
        (lambda p: hold(p, array(0, 2)), "page 2 cannot be held: it is held already"),
        (lambda p: hold(p, array(0, 1, 0)), "page 0 is to be held twice; name it once"),
        (lambda p: hold(p, array(9)), "page 9 is not from 0 to 8 (the number of pages, which"),
        (lambda p: unhold(p, array(2, 0)), "page 0 cannot be given up: it is not held"),
        (lambda p: unhold(p, array(2, 2)), "page 2 is to be given up twice"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(beams())


@pytest.mark.parametrize("operation", [append, truncate, fork])
def test_arguments_may_be_changed_afterwards(operation):
    pool, argument = grown(empty(), 1, 1, 1), array(0, 0, 0)
    after = operation(pool, argument)
    argument[:] = 3
    after = after[0] if operation is append else after
    assert set(after.lengths.tolist()) == {0 if operation is truncate else 1}


def change(field, index, value):
    """Puts a value into one of the pool's arrays."""

    def apply(pool):
        values = np.array(getattr(pool, field))
        values[index] = value
        return dataclasses.replace(pool, **{field: values})

    return apply


@pytest.mark.parametrize(
    "mutate, message",
    [
        (change("references", 3, -1), "page 3 has -1 references"),
        (change("references", 0, 1), "page 0 has 1 references, but is named 2 times and not held"),
        (change("references", 0, 3), "page 0 has 3 references, but is named 2 times"),
        (change("references", 1, 1), "row 0 would write into page 1, which others read"),
        (change("references", 5, 1), "page 5 has 1 references, but is named 0 times and not held"),
        (change("held", 5, True), "page 5 has 0 references, but is named 0 times and held"),
        (change("held", 2, False), "page 2 has 2 references, but is named 1 times and not held"),
        (change("block_tables", (0, 1), 0), "row 0 names page 0 twice"),
        (change("block_tables", (0, 1), NONE), "row 0 of 20 tokens names no page at 1, but 8"),
        (change("block_tables", (0, 1), -1), "row 0 of 20 tokens names no page at 1, but -1"),
        (change("block_tables", (2, 1), 5), "row 2 of 16 tokens names page 5 at 1"),
        (change("block_tables", (2, 1), -1), "row 2 of 16 tokens names page -1 at 1"),
        (change("block_tables", (2, 1), 9), "row 2 of 16 tokens names page 9 at 1"),
        (change("block_tables", (2, 0), 1), "page 1 is at 0 of a row and at 1 of another"),
        (change("lengths", 0, 16), "row 0 of 16 tokens names page 1 at 1"),
        (change("lengths", 0, 33), "row 0 of 33 tokens names no page at 2, but 8"),
        (change("lengths", 2, -1), "row 2 has -1 tokens in a table of 4 pages"),
        (change("lengths", 2, 65), "row 2 has 65 tokens in a table of 4 pages"),
    ],
)
def test_what_is_broken_is_found(mutate, message):
    assert violations(beams()) == []
    assert any(message in violation for violation in violations(mutate(beams())))


def test_double_frees_are_not_hidden():
    """Counts of a pool that is wrong already stay wrong: nothing is recounted or clamped."""
    pool = change("references", 0, 0)(grown(empty(), 20, 0, 0))
    pool = release(pool, np.array([True, False, False]))
    assert pool.references[0] == -1
    assert free_pages(pool) == PAGES - 1
