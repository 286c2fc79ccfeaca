"""Which pages hold which content: listed by key, shared by rows, forgotten least recent first.

Knows keys and page numbers; not tokens, and not who else counts the pages it lists.
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class _Entry:
    """One listed page; `busy` counts its users and its children that are busy."""

    page: int
    parent: bytes | None
    users: int = 0
    busy: int = 0
    children: set[bytes] = field(default_factory=set)


class PrefixIndex:
    """Pages by the key of their content; every page's predecessor is listed too.

    An entry is idle if neither it nor one that follows it has users. Only idle entries are evicted,
    what follows before what it follows.
    """

    def __init__(self):
        self._entries: dict[bytes, _Entry] = {}
        self._pages: set[int] = set()
        # Idle keys, the next to be evicted first. Whatever makes a key recent makes its
        # predecessors more recent, so that each of them stands behind all that follows it.
        self._idle: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def pages(self) -> frozenset[int]:
        """The listed pages."""
        return frozenset(self._pages)

    @property
    def idle(self) -> int:
        """How many pages `evict` could give."""
        return len(self._idle)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest listed prefix of a chain of keys; counts as a use of them.

        Raises ValueError if the keys are not a chain from its start.
        """
        found: list[bytes] = []
        for key in keys:
            if key not in self._entries:
                break
            parent = found[-1] if found else None
            if self._entries[key].parent != parent:
                raise ValueError(
                    f"key {_short(key)} does not follow {_short(parent)}; give a sequence's keys "
                    "in order, from its first page on"
                )
            found.append(key)
        for key in reversed(found):
            if key in self._idle:
                self._make_idle(key)
        return [self._entries[key].page for key in found]

    def acquire(self, keys: Sequence[bytes]) -> None:
        """One more user for each of these entries.

        Raises ValueError, before anything changes, if one of them is not listed.
        """
        for key in keys:
            self._entry(key, "be acquired")
        for key in keys:
            self._entries[key].users += 1
            self._more_busy(key)

    def release(self, keys: Sequence[bytes]) -> None:
        """One user less for each of these entries; counts as a use.

        Raises ValueError, before anything changes, if one is not listed or would have less than no
        users.
        """
        for key, times in Counter(keys).items():
            users = self._entry(key, "be released").users
            if users < times:
                raise ValueError(
                    f"key {_short(key)} has {users} users and cannot be released {times} times; "
                    "each acquire() and each insert() that listed it allows one release()"
                )
        for key in reversed(keys):
            self._entries[key].users -= 1
            self._less_busy(key)

    def insert(self, key: bytes, parent_key: bytes | None, page: int) -> bool:
        """Lists a page's content after that of `parent_key` (None: it starts a sequence).

        True: it is listed now, and the caller is its user. False: that content is listed already,
        with another page, and nothing has changed.

        Raises ValueError if the parent is not listed, or the page is, for other content.
        """
        if key in self._entries:
            return False
        if page in self._pages:
            raise ValueError(
                f"page {page} is listed already, for other content than {_short(key)}; "
                "evict it before it is written anew"
            )
        if parent_key is not None:
            self._entry(parent_key, f"have {_short(key)} follow it").children.add(key)
        self._entries[key] = _Entry(page, parent_key, users=1)
        self._pages.add(page)
        self._more_busy(key)
        return True

    def evict(self, count: int) -> list[int]:
        """Forgets up to `count` idle entries; returns their pages.

        The least recently used first, and what follows before what it follows.
        """
        if count < 0:
            raise ValueError(f"a number of pages to evict must not be negative, got {count}")
        keys = list(itertools.islice(self._idle, count))
        return [self._forget(key) for key in keys]

    def clear(self) -> list[int]:
        """Forgets everything; returns the pages.

        Raises ValueError if an entry has users.
        """
        if self.idle < len(self):
            raise ValueError(
                f"{len(self) - self.idle} of {len(self)} listed pages are in use; release them "
                "before clear(), or evict(idle) only the others"
            )
        return self.evict(len(self))

    def violations(self) -> list[str]:
        """What is inconsistent; empty unless there is a bug."""
        wrong = []
        pages = [entry.page for entry in self._entries.values()]
        if len(set(pages)) < len(pages) or set(pages) != self._pages:
            wrong.append(f"pages {sorted(pages)} are listed, {sorted(self._pages)} are noted")
        place = {key: i for i, key in enumerate(self._idle)}
        for key, entry in self._entries.items():
            name = f"key {_short(key)} (page {entry.page})"
            parent = self._entries.get(entry.parent) if entry.parent is not None else None
            if entry.parent is not None and parent is None:
                wrong.append(f"{name} follows {_short(entry.parent)}, which is not listed")
            if parent is not None and key not in parent.children:
                wrong.append(f"{name} is no child of what it follows")
            children = [self._entries[c] for c in entry.children if c in self._entries]
            if len(children) < len(entry.children) or any(c.parent != key for c in children):
                wrong.append(f"{name} has children that do not follow it")
            if entry.users < 0:
                wrong.append(f"{name} has {entry.users} users")
            if entry.busy != entry.users + sum(child.busy > 0 for child in children):
                wrong.append(f"{name} counts itself busy {entry.busy} times")
            if (entry.busy == 0) != (key in place):
                wrong.append(f"{name} is busy {entry.busy} times, idle: {key in place}")
            elif any(place.get(c, -1) > place.get(key, len(place)) for c in entry.children):
                wrong.append(f"{name} would be evicted before what follows it")
        wrong += [f"key {_short(k)} is idle, not listed" for k in place if k not in self._entries]
        return wrong

    def _entry(self, key: bytes, purpose: str) -> _Entry:
        if key not in self._entries:
            raise ValueError(
                f"key {_short(key)} is not listed and cannot {purpose}; insert it, and keep it "
                "acquired while it is needed"
            )
        return self._entries[key]

    def _more_busy(self, key: bytes | None) -> None:
        while key is not None:
            entry = self._entries[key]
            entry.busy += 1
            if entry.busy > 1:
                return
            self._idle.pop(key, None)
            key = entry.parent

    def _less_busy(self, key: bytes | None) -> None:
        while key is not None:
            entry = self._entries[key]
            entry.busy -= 1
            if entry.busy > 0:
                return
            self._make_idle(key)
            key = entry.parent

    def _make_idle(self, key: bytes) -> None:
        """Makes it the last to be evicted."""
        self._idle[key] = None
        self._idle.move_to_end(key)

    def _forget(self, key: bytes) -> int:
        del self._idle[key]
        entry = self._entries.pop(key)
        self._pages.remove(entry.page)
        if entry.parent is not None:
            self._entries[entry.parent].children.remove(key)
        return entry.page


def _short(key: bytes | None) -> str:
    return "the start" if key is None else key[:6].hex()
