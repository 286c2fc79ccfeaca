"""The rows of the page pool: who holds which, what they share, and what is kept for later.

Brings the pool's bookkeeping and the prefix index together; knows tokens, not requests or models.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from moe_jax.cache.content_key import page_keys, root_key
from moe_jax.cache.page_pool import (
    PageCopies,
    PagePool,
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


class SharedPrefix:
    """What one sequence uses of the prefix index: the keys of its first pages.

    Attributes:
      keys: of all its full pages so far.
      used: how many of them, from the start, it holds in the index.
      open: whether more of its pages may be listed; not after one that another page stands for.
    """

    def __init__(self, enabled: bool = True):
        self.keys: list[bytes] = []
        self.used = 0
        self.open = enabled


class KvRows:
    """Rows of KV pages that grow, fork, share prefixes and end.

    Every change of what pages hold goes through here, so that free pages, shared pages and pages
    kept for a later request with the same beginning are counted once.
    """

    def __init__(self, pages: int, rows: int, identity: bytes | None):
        """`identity`: the SHA-256 of all that decides what keys and values are; None: rows share
        no prefixes.
        """
        self.pages = pages
        self._rows = rows
        self._root = None if identity is None else root_key(identity)
        self.clear()

    def clear(self) -> None:
        """Forgets everything: no row holds a page, nothing is kept."""
        self._pool: PagePool = empty_pool(self.pages, self._rows, self.pages)
        self._index = PrefixIndex()
        self._unused = list(range(self._rows))[::-1]

    @property
    def available(self) -> int:
        """Pages that are free, or kept but used by nobody."""
        return free_pages(self._pool) + self._index.idle

    @property
    def tables(self) -> Int[np.ndarray, "rows pages_per_row"]:
        """The pages of every row; ids that name no page are past the end."""
        return self._pool.block_tables

    def held(self, rows: Sequence[int]) -> int:
        """How many pages these rows hold together."""
        named = np.unique(self.tables[list(rows)])
        return int(np.count_nonzero(named < self.pages))

    def take(self, count: int) -> list[int]:
        """Empty rows for a request that starts."""
        return [self._unused.pop() for _ in range(count)]

    def share(self, row: int, prefix: SharedPrefix, tokens: Sequence[int]) -> int:
        """Starts an empty row with the pages whose content is that of the first tokens.

        The last token is left out, because something must be computed to go on from. Returns how
        many tokens the row holds now.
        """
        if self._root is None or not prefix.open:
            return 0
        prefix.keys = page_keys(self._root, tokens[: len(tokens) - 1], prefix.keys)
        found = self._index.match(prefix.keys)
        if found:
            prefix.used = len(found)
            self._index.acquire(prefix.keys[: prefix.used])
            pages = np.full(self.pages, self.pages, np.int32)
            pages[: len(found)] = found
            self._pool = adopt(self._pool, row, pages, len(found))
        return len(found) * PAGE_SIZE

    def grow(self, counts: Mapping[int, int]) -> PageCopies | None:
        """Makes room for this many more tokens in each row; what is copied first, if anything is.

        Pages kept for later give way, the least recently used first.
        """
        by_row = np.zeros(self._rows, np.int32)
        by_row[list(counts)] = list(counts.values())
        pool, copies, short = append(self._pool, by_row)
        while short and self._index.idle:
            self._evict(short)
            pool, copies, short = append(self._pool, by_row)
        if short:
            raise RuntimeError(f"the KV cache is {short} pages short; this is a bug")
        self._pool = pool
        return copies if np.any(np.asarray(copies.target) < self.pages) else None

    def list_pages(self, written: Sequence[tuple[int, SharedPrefix, Sequence[int], int]]) -> None:
        """Lets later requests share the full pages of these rows.

        Each with its prefix, its tokens, and how many of them are in its pages.
        """
        if self._root is None:
            return
        held: list[int] = []
        for row, prefix, tokens, length in written:
            full = length // PAGE_SIZE
            if not prefix.open or full <= prefix.used:
                continue
            prefix.keys = page_keys(self._root, tokens[:length], prefix.keys)
            table = self.tables[row]
            for place in range(prefix.used, full):
                parent = prefix.keys[place - 1] if place else None
                page = int(table[place])
                prefix.open = self._index.insert(prefix.keys[place], parent, page)
                if not prefix.open:
                    break
                prefix.used += 1
                held.append(page)
        if held:
            self._pool = hold(self._pool, np.array(held))

    def fork(self, parent: Mapping[int, int]) -> None:
        """Makes rows what others were before, all at once; every other row stays."""
        by_row = np.arange(self._rows, dtype=np.int32)
        by_row[list(parent)] = list(parent.values())
        self._pool = fork(self._pool, by_row)

    def shorten(self, lengths: Mapping[int, int]) -> None:
        """Drops the last tokens of rows that hold more than this."""
        before = self._pool.lengths
        shorter = {row: length for row, length in lengths.items() if length < before[row]}
        if shorter:
            by_row = before.copy()
            by_row[list(shorter)] = list(shorter.values())
            self._pool = truncate(self._pool, by_row)

    def give_back(self, rows: Sequence[int], prefix: SharedPrefix | None = None) -> None:
        """Ends rows, and what their sequence used of the index."""
        if rows:
            gone = np.zeros(self._rows, bool)
            gone[list(rows)] = True
            self._pool = release(self._pool, gone)
            self._unused += rows
        if prefix is not None:
            self._index.release(prefix.keys[: prefix.used])
            prefix.used = 0

    def violations(self) -> list[str]:
        """What is wrong; nothing, ever."""
        wrong = violations(self._pool) + self._index.violations()
        held = set(np.flatnonzero(self._pool.held).tolist())
        if (listed := self._index.pages) != held:
            wrong.append(f"pages {sorted(listed ^ held)} are either listed or held, not both")
        lengths = self._pool.lengths
        wrong += [f"row {row} is unused and holds tokens" for row in self._unused if lengths[row]]
        if len(set(self._unused)) < len(self._unused):
            wrong.append(f"a row is unused twice: {self._unused}")
        return wrong

    def _evict(self, count: int) -> None:
        """Frees so many pages that are only kept for later, if there are so many."""
        if count > 0 and (evicted := self._index.evict(count)):
            self._pool = unhold(self._pool, np.array(evicted))
