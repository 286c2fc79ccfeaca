"""Which row owns which page of the KV cache: block tables, lengths and reference counts.

Knows page numbers and token counts; not what is in a page, and not which request a row serves. All
in numpy: a program, however small, would wait its turn behind the layers of a step on XLA:CPU, and
Python with it. Every change checks its arguments and returns another pool; arrays that it does not
change are shared, and none is ever written to again.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int, Int32

from moe_jax.cache.paged_kv import PAGE_SIZE, PageCopies

Rows = Int[np.ndarray, " rows"]


@dataclass(frozen=True)
class PagePool:
    """Who owns what.

    Attributes:
      references: of each page, the rows that name it, and one more if it is held; 0: it is free.
      held: whether the prefix index lists the page.
      block_tables: the pages of each row in order; entries past them are `pages`: no page.
      lengths: tokens of each row.
    """

    references: Int32[np.ndarray, " pages"]
    held: Bool[np.ndarray, " pages"]
    block_tables: Int32[np.ndarray, "rows pages_per_row"]
    lengths: Int32[np.ndarray, " rows"]

    def __post_init__(self):
        for array in vars(self).values():
            array.flags.writeable = False


def empty_pool(pages: int, rows: int, pages_per_row: int) -> PagePool:
    """A pool in which all pages are free and all rows empty."""
    return PagePool(
        references=np.zeros(pages, np.int32),
        held=np.zeros(pages, bool),
        block_tables=np.full((rows, pages_per_row), pages, np.int32),
        lengths=np.zeros(rows, np.int32),
    )


def append(pool: PagePool, counts: Rows) -> tuple[PagePool, PageCopies, int]:
    """Rows grow by `counts` tokens, in pages that no other row and no index can read.

    New pages are the lowest that are free, given to rows in order. If others refer to the partly
    filled last page of a row that grows, the row gets a new page in its place, and the contents are
    to be copied before anything is written; if only growing rows do, the first of them keeps it.

    Returns the pool, the copies, and how many pages are missing. If any are, the pool is as before
    and there is nothing to copy.

    Raises ValueError if a count is negative or a row would outgrow its block table.
    """
    counts = np.asarray(counts, np.int32)
    lengths = pool.lengths + counts
    (rows, pages_per_row), pages = pool.block_tables.shape, pool.references.size
    capacity = pages_per_row * PAGE_SIZE
    if counts.min() < 0 or lengths.max() > capacity:
        row = int(counts.argmin() if counts.min() < 0 else lengths.argmax())
        raise ValueError(
            f"row {row} cannot grow by {counts[row]} tokens to {lengths[row]}: its block table "
            f"holds {capacity}; end the sequence, or truncate() it to drop tokens"
        )
    copied, last = _to_be_copied(pool, counts)
    start = _pages_of(pool.lengths)
    start[copied] -= 1
    needed = _pages_of(lengths) - start
    source, target = np.full((2, rows), pages, np.int32)
    if not needed.any():
        return replace(pool, lengths=lengths), PageCopies(source, target), 0
    (free,) = (pool.references == 0).nonzero()
    if short := max(int(needed.sum()) - free.size, 0):
        return pool, PageCopies(source, target), short

    row = np.repeat(np.arange(rows), needed)
    nth = np.arange(row.size) - (needed.cumsum() - needed)[row]
    tables, references = pool.block_tables.copy(), pool.references.copy()
    tables[row, start[row] + nth] = taken = free[: row.size]
    references[taken] = 1
    np.subtract.at(references, last, 1)
    source[copied] = last
    target[copied] = tables[copied, start[copied]]
    return PagePool(references, pool.held, tables, lengths), PageCopies(source, target), 0


def _pages_of(lengths: Rows) -> Rows:
    return -(-lengths // PAGE_SIZE)


def _to_be_copied(pool: PagePool, counts: Rows) -> tuple[Int[np.ndarray, " _"], ...]:
    """The rows that grow in a page which is not theirs to write into, and these pages."""
    (rows,) = ((counts > 0) & (pool.lengths % PAGE_SIZE > 0)).nonzero()
    last = pool.block_tables[rows, pool.lengths[rows] // PAGE_SIZE]
    if (pool.references[last] == 1).all():  # as in most steps
        return rows[:0], last[:0]
    _, first, place, writers = np.unique(
        last, return_index=True, return_inverse=True, return_counts=True
    )
    keeps = (pool.references[last] == writers[place]) & (first[place] == np.arange(rows.size))
    return rows[~keeps], last[~keeps]


def fork(pool: PagePool, parent: Rows) -> PagePool:
    """Row r becomes what row parent[r] was; parent[r] == rows: it becomes empty.

    All rows at once, so that a permutation with repeats moves no page.

    Raises ValueError if a parent is neither.
    """
    parent = np.asarray(parent, np.int32)
    rows, pages = pool.lengths.size, pool.references.size
    _check_range("parent", parent, rows, "the number of rows, which makes a row empty")
    kept = parent < rows
    copies = np.bincount(parent[kept], minlength=rows)
    references = pool.references.copy()
    for row in (copies != 1).nonzero()[0]:
        own = pool.block_tables[row]
        references[own[own < pages]] += copies[row] - 1
    tables, lengths = np.full_like(pool.block_tables, pages), np.zeros_like(pool.lengths)
    tables[kept], lengths[kept] = pool.block_tables[parent[kept]], pool.lengths[parent[kept]]
    return PagePool(references, pool.held, tables, lengths)


def release(pool: PagePool, gone: Bool[np.ndarray, " rows"]) -> PagePool:
    """These rows become empty."""
    rows = pool.lengths.size
    return fork(pool, np.where(gone, rows, np.arange(rows)))


def adopt(
    pool: PagePool, row: int, pages: Int[np.ndarray, " pages_per_row"], count: int
) -> PagePool:
    """An empty row starts with the first `count` of these pages, all full; others are ignored.

    Raises ValueError if the row is not empty, or one of the pages is free or named twice.
    """
    pages = np.asarray(pages, np.int32)
    if not 0 <= row < pool.lengths.size or int(pool.lengths[row]):
        raise ValueError(
            f"row {row} is not an empty row of {pool.lengths.size}; release() it first"
        )
    if not 0 <= count <= pages.size:
        raise ValueError(f"a row of {pages.size} pages cannot adopt {count}")
    _check_pages(pages[:count], pool.references > 0, "adopted", "free")
    references, tables, lengths = (
        array.copy() for array in (pool.references, pool.block_tables, pool.lengths)
    )
    references[pages[:count]] += 1
    tables[row, :count] = pages[:count]
    lengths[row] = count * PAGE_SIZE
    return PagePool(references, pool.held, tables, lengths)


def truncate(pool: PagePool, lengths: Rows) -> PagePool:
    """Rows keep only their first `lengths` tokens; pages that none of those is in are given back.

    Raises ValueError if a row does not have that many.
    """
    lengths, old = np.array(lengths, np.int32), pool.lengths
    wrong = np.flatnonzero((lengths < 0) | (lengths > old))
    if wrong.size:
        row = wrong[0]
        raise ValueError(
            f"row {row} of {old[row]} tokens cannot be truncated to {lengths[row]}; "
            "append() adds tokens"
        )
    first, end = _pages_of(lengths), _pages_of(old)
    references, tables = pool.references.copy(), pool.block_tables.copy()
    for row in (first < end).nonzero()[0]:
        dropped = tables[row, first[row] : end[row]]
        references[dropped] -= 1
        dropped[:] = pool.references.size
    return PagePool(references, pool.held, tables, lengths)


def hold(pool: PagePool, pages: Int[np.ndarray, " listed"]) -> PagePool:
    """These pages stay when no row names them any more; entries equal to the pool's size name none.

    Raises ValueError if one of them is free, held already, or named twice.
    """
    held, pages = pool.held.copy(), _named(pool, pages)
    _check_pages(pages, pool.references > 0, "held", "free")
    _check_pages(pages, ~held, "held", "held already")
    held[pages] = True
    return _with_held(pool, held)


def unhold(pool: PagePool, pages: Int[np.ndarray, " listed"]) -> PagePool:
    """Undoes `hold`: those of the pages that no row names are free.

    Raises ValueError if one of them is not held, or named twice.
    """
    held, pages = pool.held.copy(), _named(pool, pages)
    _check_pages(pages, held, "given up", "not held")
    held[pages] = False
    return _with_held(pool, held)


def _with_held(pool: PagePool, held: Bool[np.ndarray, " pages"]) -> PagePool:
    change = held.astype(np.int32) - pool.held
    return replace(pool, references=pool.references + change, held=held)


def free_pages(pool: PagePool) -> int:
    """How many pages nothing refers to."""
    return int(np.count_nonzero(pool.references == 0))


def violations(pool: PagePool) -> list[str]:
    """What is inconsistent; empty unless there is a bug."""
    references, held = pool.references, pool.held
    tables, lengths = pool.block_tables, pool.lengths
    pages, (rows, pages_per_row) = references.size, tables.shape
    wrong = []

    needed = _pages_of(lengths)
    for row in np.flatnonzero((lengths < 0) | (needed > pages_per_row)):
        wrong.append(f"row {row} has {lengths[row]} tokens in a table of {pages_per_row} pages")
    column = np.broadcast_to(np.arange(pages_per_row), tables.shape)
    past, named = column >= needed[:, None], (tables >= 0) & (tables < pages)
    for row, i in np.argwhere(~past & ~named):
        wrong.append(
            f"row {row} of {lengths[row]} tokens names no page at {i}, but {tables[row, i]}"
        )
    for row, i in np.argwhere(past & (tables != pages)):
        wrong.append(f"row {row} of {lengths[row]} tokens names page {tables[row, i]} at {i}")

    uses = np.bincount(tables[named], minlength=pages)
    for row in range(rows):
        own, times = np.unique(tables[row, named[row]], return_counts=True)
        wrong += [f"row {row} names page {page} twice" for page in own[times > 1]]
    lowest, highest = np.full(pages, pages_per_row), np.full(pages, -1)
    np.minimum.at(lowest, tables[named], column[named])
    np.maximum.at(highest, tables[named], column[named])
    for page in np.flatnonzero((uses > 1) & (lowest != highest)):
        wrong.append(f"page {page} is at {lowest[page]} of a row and at {highest[page]} of another")

    for page in np.flatnonzero(references < 0):
        wrong.append(f"page {page} has {references[page]} references")
    for page in np.flatnonzero(references != uses + held):
        wrong.append(
            f"page {page} has {references[page]} references, but is named {uses[page]} times and "
            f"{'held' if held[page] else 'not held'}"
        )
    partial = ~past & (column == (lengths // PAGE_SIZE)[:, None]) & named
    for row, i in np.argwhere(partial):
        page = tables[row, i]
        if references[page] <= 1 < uses[page] + held[page]:
            wrong.append(f"row {row} would write into page {page}, which others read")
    return wrong


def _named(pool: PagePool, pages: Int[np.ndarray, " listed"]) -> Int[np.ndarray, " _named"]:
    """The entries that name a page."""
    pages = np.asarray(pages, np.int32)
    _check_range("page", pages, pool.references.size, "the number of pages, which names none")
    return pages[pages < pool.references.size]


def _check_range(what: str, values: Int[np.ndarray, " _"], limit: int, meaning: str) -> None:
    wrong = values[(values < 0) | (values > limit)]
    if wrong.size:
        raise ValueError(f"{what} {wrong[0]} is not from 0 to {limit} ({meaning})")


def _check_pages(
    pages: Int[np.ndarray, " _named"], good: Bool[np.ndarray, " pages"], verb: str, bad: str
) -> None:
    """Refuses pages that do not exist, are named twice, or are not `good`."""
    numbers, times = np.unique(pages, return_counts=True)
    if numbers.size and not 0 <= numbers[0] <= numbers[-1] < good.size:
        raise ValueError(f"pages to be {verb} must be from 0 to {good.size - 1}, got {numbers}")
    if numbers.size < pages.size:
        raise ValueError(f"page {numbers[times > 1][0]} is to be {verb} twice; name it once")
    if not good[numbers].all():
        raise ValueError(f"page {numbers[~good[numbers]][0]} cannot be {verb}: it is {bad}")
