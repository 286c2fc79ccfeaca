"""Which row owns which page of the KV cache: block tables, lengths and reference counts.

Knows page numbers and token counts; not what is in a page, and not which request a row serves. The
arrays live on the host's own device, so that reading them never waits for the accelerator. Every
change checks its arguments, then runs one small program, compiled once per shape of the pool; only
rows that grow inside pages of their own, as in most steps of decoding, need none.
Arguments are copied: XLA:CPU may use a numpy array where it is, after the caller has changed it.
"""

from dataclasses import dataclass, replace
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from host_offload.memory import host_device
from moe_jax.cache.paged_kv import PAGE_SIZE, PageCopies

Rows = Int[Array | np.ndarray, " rows"]


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagePool:
    """Who owns what.

    Attributes:
      references: of each page, the rows that name it, and one more if it is held; 0: it is free.
      held: whether the prefix index lists the page.
      block_tables: the pages of each row in order; entries past them are `pages`: no page.
      lengths: tokens of each row; in numpy, for they change at every step.
    """

    references: Int32[Array, " pages"]
    held: Bool[Array, " pages"]
    block_tables: Int32[Array, "rows pages_per_row"]
    lengths: Int32[Array | np.ndarray, " rows"]  # an Array inside programs only


def empty_pool(pages: int, rows: int, pages_per_row: int) -> PagePool:
    """A pool in which all pages are free and all rows empty."""
    on_host = lambda array: jax.device_put(array, host_device())
    return PagePool(
        references=on_host(np.zeros(pages, np.int32)),
        held=on_host(np.zeros(pages, bool)),
        block_tables=on_host(np.full((rows, pages_per_row), pages, np.int32)),
        lengths=np.zeros(rows, np.int32),
    )


def append(
    pool: PagePool, counts: Rows
) -> tuple[PagePool, PageCopies, Int32[Array | np.ndarray | np.generic, ""]]:
    """Rows grow by `counts` tokens, in pages that no other row and no index can read.

    New pages are the lowest that are free, given to rows in order. If others refer to the partly
    filled last page of a row that grows, the row gets a new page in its place, and the contents are
    to be copied before anything is written; if only growing rows do, the first of them keeps it.

    Returns the pool, the copies, and how many pages are missing. If any are, the pool is as before
    and there is nothing to copy.

    Raises ValueError if a count is negative or a row would outgrow its block table.
    """
    counts = np.array(counts, np.int32)
    lengths = pool.lengths + counts
    capacity = pool.block_tables.shape[1] * PAGE_SIZE
    if counts.min() < 0 or lengths.max() > capacity:
        row = int(counts.argmin() if counts.min() < 0 else lengths.argmax())
        raise ValueError(
            f"row {row} cannot grow by {counts[row]} tokens to {lengths[row]}: its block table "
            f"holds {capacity}; end the sequence, or truncate() it to drop tokens"
        )
    if _have_room(pool, counts):
        no_page = np.full(counts.size, pool.references.shape[0], np.int32)
        return replace(pool, lengths=lengths), PageCopies(no_page, no_page), np.int32(0)
    pool, copies, short = _append(pool, counts)
    return _changed(pool), copies, short


def _have_room(pool: PagePool, counts: Int[np.ndarray, " rows"]) -> bool:
    """Whether all rows that grow do so in a page that they have and that nobody else refers to."""
    (rows,) = counts.nonzero()
    before = pool.lengths[rows]
    last = np.asarray(pool.block_tables)[rows, before // PAGE_SIZE]
    offset = before % PAGE_SIZE
    fit = (offset > 0) & (offset + counts[rows] <= PAGE_SIZE)
    return bool(fit.all() and (np.asarray(pool.references)[last] == 1).all())


def _changed(pool: PagePool) -> PagePool:
    """What a program returned."""
    return replace(pool, lengths=np.asarray(pool.lengths))


@jax.jit
def _append(pool, counts):
    (pages,), (rows,) = pool.references.shape, pool.lengths.shape
    row = jnp.arange(rows, dtype=jnp.int32)
    before = -(-pool.lengths // PAGE_SIZE)
    after = -(-(pool.lengths + counts) // PAGE_SIZE)

    # Where the next token goes: the partly filled last page, or an entry that names no page.
    last = pool.block_tables.at[row, pool.lengths // PAGE_SIZE].get(mode="fill", fill_value=pages)
    last = jnp.where(counts > 0, last, pages)
    writers = jnp.zeros(pages, jnp.int32).at[last].add(1, mode="drop")
    first = jnp.full(pages, rows, jnp.int32).at[last].min(row, mode="drop")
    keeps = (pool.references == writers).at[last].get(mode="fill", fill_value=True)
    keeps &= first.at[last].get(mode="fill", fill_value=0) == row
    copies = (last < pages) & ~keeps

    start = before - copies.astype(jnp.int32)
    needed = jnp.cumsum(after - start)
    free = pool.references == 0
    nth_free = jnp.cumsum(free, dtype=jnp.int32)
    short = jnp.maximum(needed[-1] - nth_free[-1], 0)
    enough = needed[-1] <= nth_free[-1]

    # Seen from the free pages: which row takes each, and where in its table it goes.
    taken = free & (nth_free <= needed[-1]) & enough
    owner = jnp.searchsorted(needed, nth_free - 1, side="right", method="scan_unrolled")
    owner = jnp.where(taken, owner, rows)
    place = (after - needed).at[owner].get(mode="fill", fill_value=0) + nth_free - 1
    page = jnp.arange(pages, dtype=jnp.int32)
    tables = pool.block_tables.at[owner, place].set(page, mode="drop")

    source = jnp.where(copies & enough, last, pages)
    target = tables.at[row, pool.lengths // PAGE_SIZE].get(mode="fill", fill_value=pages)
    target = jnp.where(copies & enough, target, pages)
    references = pool.references + taken.astype(jnp.int32)
    references = references.at[source].add(-1, mode="drop")
    lengths = pool.lengths + jnp.where(enough, counts, 0)
    return PagePool(references, pool.held, tables, lengths), PageCopies(source, target), short


def fork(pool: PagePool, parent: Rows) -> PagePool:
    """Row r becomes what row parent[r] was; parent[r] == rows: it becomes empty.

    All rows at once, so that a permutation with repeats moves no page.

    Raises ValueError if a parent is neither.
    """
    parent = np.array(parent, np.int32)
    rows = pool.lengths.shape[0]
    _check_range("parent", parent, rows, "the number of rows, which makes a row empty")
    return _changed(_fork(pool, parent))


@jax.jit
def _fork(pool, parent):
    (pages,), (rows,) = pool.references.shape, pool.lengths.shape
    copies = jnp.zeros(rows, jnp.int32).at[parent].add(1, mode="drop")
    more = jnp.broadcast_to(copies[:, None] - 1, pool.block_tables.shape)
    return PagePool(
        references=pool.references.at[pool.block_tables].add(more, mode="drop"),
        held=pool.held,
        block_tables=pool.block_tables.at[parent].get(mode="fill", fill_value=pages),
        lengths=pool.lengths.at[parent].get(mode="fill", fill_value=0),
    )


def release(pool: PagePool, gone: Bool[Array | np.ndarray, " rows"]) -> PagePool:
    """These rows become empty."""
    rows = pool.lengths.shape[0]
    return _changed(_fork(pool, np.where(gone, rows, np.arange(rows)).astype(np.int32)))


def adopt(
    pool: PagePool, row: int, pages: Int[Array | np.ndarray, " pages_per_row"], count: int
) -> PagePool:
    """An empty row starts with the first `count` of these pages, all full; others are ignored.

    Raises ValueError if the row is not empty, or one of the pages is free or named twice.
    """
    pages = np.array(pages, np.int32)
    if not 0 <= row < pool.lengths.shape[0] or int(pool.lengths[row]):
        raise ValueError(
            f"row {row} is not an empty row of {pool.lengths.shape[0]}; release() it first"
        )
    if not 0 <= count <= pages.size:
        raise ValueError(f"a row of {pages.size} pages cannot adopt {count}")
    _check_pages(pages[:count], np.asarray(pool.references) > 0, "adopted", "free")
    return _changed(_adopt(pool, np.int32(row), pages, np.int32(count)))


@jax.jit
def _adopt(pool, row, pages, count):
    none = pool.references.shape[0]
    pages = jnp.where(jnp.arange(pages.shape[0]) < count, pages, none)
    return PagePool(
        references=pool.references.at[pages].add(1, mode="drop"),
        held=pool.held,
        block_tables=pool.block_tables.at[row].set(pages),
        lengths=pool.lengths.at[row].set(count * PAGE_SIZE),
    )


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
    return _changed(_truncate(pool, lengths))


@jax.jit
def _truncate(pool, lengths):
    none = pool.references.shape[0]
    column = jnp.arange(pool.block_tables.shape[1], dtype=jnp.int32)[None, :]
    kept = column < -(-lengths // PAGE_SIZE)[:, None]
    dropped = jnp.where(kept, none, pool.block_tables)
    return PagePool(
        references=pool.references.at[dropped].add(-1, mode="drop"),
        held=pool.held,
        block_tables=jnp.where(kept, pool.block_tables, none),
        lengths=lengths,
    )


def hold(pool: PagePool, pages: Int[Array | np.ndarray, " listed"]) -> PagePool:
    """These pages stay when no row names them any more; entries equal to the pool's size name none.

    Raises ValueError if one of them is free, held already, or named twice.
    """
    held, pages = np.array(pool.held), _named(pool, pages)
    _check_pages(pages, np.asarray(pool.references) > 0, "held", "free")
    _check_pages(pages, ~held, "held", "held already")
    held[pages] = True
    return _changed(_set_held(pool, held))


def unhold(pool: PagePool, pages: Int[Array | np.ndarray, " listed"]) -> PagePool:
    """Undoes `hold`: those of the pages that no row names are free.

    Raises ValueError if one of them is not held, or named twice.
    """
    held, pages = np.array(pool.held), _named(pool, pages)
    _check_pages(pages, held, "given up", "not held")
    held[pages] = False
    return _changed(_set_held(pool, held))


@jax.jit
def _set_held(pool, held):
    change = held.astype(jnp.int32) - pool.held.astype(jnp.int32)
    return PagePool(pool.references + change, held, pool.block_tables, pool.lengths)


def free_pages(pool: PagePool) -> int:
    """How many pages nothing refers to."""
    return int(np.count_nonzero(np.asarray(pool.references) == 0))


def violations(pool: PagePool) -> list[str]:
    """What is inconsistent; empty unless there is a bug."""
    references, held = np.asarray(pool.references), np.asarray(pool.held)
    tables, lengths = np.asarray(pool.block_tables), pool.lengths
    pages, (rows, pages_per_row) = references.size, tables.shape
    wrong = []
    if held.shape != (pages,) or lengths.shape != (rows,):
        return [f"{held.size} held for {pages} pages, {lengths.size} lengths for {rows} rows"]

    needed = -(-lengths // PAGE_SIZE)
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


def _named(pool: PagePool, pages: Int[Array | np.ndarray, " listed"]) -> Int[np.ndarray, " _named"]:
    """The entries that name a page."""
    pages = np.asarray(pages, np.int32)
    _check_range("page", pages, pool.references.shape[0], "the number of pages, which names none")
    return pages[pages < pool.references.shape[0]]


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
