"""The prefix index against a plain model of it, and what it refuses."""

import itertools
import re

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moe_jax.cache.prefix_index import PrefixIndex


def key(text):
    """Of the content that these letters, one per page, name from the start of a sequence."""
    return text.encode().ljust(32, b".")


def chain(text):
    return [key(text[: n + 1]) for n in range(len(text))]


def listed(*texts):
    """An index of these sequences, in this order, without users; and the page of each prefix."""
    index, pages, number = PrefixIndex(), {}, itertools.count()
    for text in texts:
        known = len(index.match(chain(text)))
        index.acquire(chain(text)[:known])
        for n in range(known + 1, len(text) + 1):
            pages[text[:n]] = next(number)
            parent = key(text[: n - 1]) if n > 1 else None
            assert index.insert(key(text[:n]), parent, pages[text[:n]])
        index.release(chain(text))
    return index, pages


def test_the_longest_listed_prefix_is_found():
    index, pages = listed("abc", "abd")
    assert index.match(chain("abdx")) == [pages["a"], pages["ab"], pages["abd"]]
    assert index.match(chain("b")) == index.match([]) == []


def test_the_least_recently_used_goes_first_and_of_a_sequence_its_end():
    index, pages = listed("abc", "xy", "abd")
    index.match(chain("x"))
    order = ["abc", "xy", "abd", "ab", "a", "x"]
    assert index.evict(4) + index.evict(9) == [pages[text] for text in order]


def test_a_page_stays_while_one_that_follows_it_is_used():
    index, pages = listed("abc", "x")
    index.acquire([key("ab")])
    assert (index.idle, len(index)) == (2, 4)
    assert index.evict(9) == [pages["abc"], pages["x"]]
    index.release([key("ab")])
    assert index.clear() == [pages["ab"], pages["a"]]
    assert (index.idle, len(index)) == (0, 0)


def test_content_is_listed_once():
    index, pages = listed("a")
    assert not index.insert(key("a"), None, 7)
    assert index.idle == 1
    assert index.match(chain("a")) == [pages["a"]]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda i: i.match([key("ab")]), "does not follow the start; give a sequence's keys in"),
        (lambda i: i.match([key("a"), key("abc")]), "does not follow"),
        (lambda i: i.acquire([key("a"), key("x")]), "is not listed and cannot be acquired"),
        (lambda i: i.release([key("x")]), "is not listed and cannot be released; insert it"),
        (lambda i: i.release([key("a")]), "has 0 users and cannot be released 1 times"),
        (lambda i: i.insert(key("xy"), key("x"), 9), "is not listed and cannot have"),
        (lambda i: i.insert(key("x"), None, 1), "page 1 is listed already, for other content"),
        (lambda i: i.evict(-1), "must not be negative, got -1"),
        (lambda i: i.acquire([key("c")]) or i.clear(), "1 of 4 listed pages are in use; release"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_and_changes_nothing(call, message):
    index, _ = listed("abc", "c")
    with pytest.raises(ValueError, match=re.escape(message)):
        call(index)
    assert index.violations() == []
    assert len(index) == 4


def broken(change):
    index, _ = listed("abc", "x")
    index.acquire([key("x")])
    assert index.violations() == []
    change(index)
    return index.violations()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: setattr(i._entries[key("a")], "users", -1), "has -1 users"),
        (lambda i: setattr(i._entries[key("x")], "users", 0), "counts itself busy 1 times"),
        (lambda i: setattr(i._entries[key("a")], "page", 1), "pages [1, 1, 2, 3] are listed"),
        (lambda i: i._pages.add(9), "are listed, [0, 1, 2, 3, 9] are noted"),
        (lambda i: i._entries.pop(key("a")), "which is not listed"),
        (lambda i: i._entries.pop(key("abc")), "has children that do not follow it"),
        (lambda i: i._entries[key("a")].children.clear(), "is no child of what it follows"),
        (lambda i: i._entries[key("x")].children.add(key("a")), "has children that do not follow"),
        (lambda i: i._idle.pop(key("a")), "is busy 0 times, idle: False"),
        (lambda i: i._idle.update({key("x"): None}), "is busy 1 times, idle: True"),
        (lambda i: i._idle.update({key("z"): None}), "is idle, not listed"),
        (lambda i: i._idle.move_to_end(key("abc")), "would be evicted before what follows it"),
    ],
)  # fmt: skip
def test_what_is_broken_is_found(change, message):
    assert any(message in violation for violation in broken(change))


class PlainIndex:
    """What the index promises, found by looking at everything."""

    def __init__(self):
        self.pages, self.users, self.used, self.now = {}, {}, {}, 0

    def busy(self, text):
        return any(self.users[other] for other in self.pages if other.startswith(text))

    def use(self, texts):
        self.now += 1
        self.used |= dict.fromkeys(texts, self.now)

    def change_users(self, texts, change):
        before = {text for text in self.pages if self.busy(text)}
        for text in texts:
            self.users[text] += change
        self.use([text for text in before if not self.busy(text)])

    def evict(self, count):
        pages = []
        for _ in range(count):
            ends = [
                text for text in self.pages
                if not self.busy(text) and not any(o[:-1] == text for o in self.pages)
            ]  # fmt: skip
            if not ends:
                break
            first = min(ends, key=lambda text: (self.used[text], -len(text)))
            pages.append(self.pages.pop(first))
            del self.users[first], self.used[first]
        return pages


TEXTS = st.text(alphabet="ab", min_size=1, max_size=4)


class IndexMachine(RuleBasedStateMachine):
    """Rows come with a sequence, list what is new of it, and go."""

    def __init__(self):
        super().__init__()
        self.index, self.plain, self.rows = PrefixIndex(), PlainIndex(), []
        self.numbers = itertools.count()

    def found(self, text):
        prefixes = [text[: n + 1] for n in range(len(text))]
        return list(itertools.takewhile(lambda prefix: prefix in self.plain.pages, prefixes))

    @rule(text=TEXTS)
    def look(self, text):
        found = self.found(text)
        assert self.index.match(chain(text)) == [self.plain.pages[t] for t in found]
        self.plain.use([t for t in found if not self.plain.busy(t)])

    @rule(text=TEXTS)
    def come(self, text):
        self.look(text)
        found = self.found(text)
        self.index.acquire([key(t) for t in found])
        self.plain.change_users(found, 1)
        for n in range(len(found), len(text)):
            t, page = text[: n + 1], next(self.numbers)
            assert self.index.insert(key(t), key(text[:n]) if n else None, page)
            self.plain.pages[t], self.plain.users[t] = page, 1
            assert not self.index.insert(key(t), None, page + 1000)
        self.rows.append([text[: n + 1] for n in range(len(text))])

    @rule(text=TEXTS)
    def use_only_the_end(self, text):
        if found := self.found(text)[-1:]:
            self.index.acquire([key(t) for t in found])
            self.plain.change_users(found, 1)
            self.rows.append(found)

    @precondition(lambda self: self.rows)
    @rule(which=st.integers(0, 99), first_page_first=st.booleans())
    def go(self, which, first_page_first):
        row = self.rows.pop(which % len(self.rows))
        self.index.release([key(t) for t in row][:: 1 if first_page_first else -1])
        self.plain.change_users(row, -1)

    @rule(count=st.integers(0, 4))
    def evict(self, count):
        assert self.index.evict(count) == self.plain.evict(count)

    @invariant()
    def agree(self):
        assert self.index.violations() == []
        assert len(self.index) == len(self.plain.pages)
        assert self.index.pages == set(self.plain.pages.values())
        assert self.index.idle == sum(not self.plain.busy(text) for text in self.plain.pages)

    def teardown(self):
        while self.rows:
            self.go(0, True)
        assert sorted(self.index.clear()) == sorted(self.plain.pages.values())
        assert (len(self.index), self.index.idle) == (0, 0)
        assert self.index.violations() == []


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=350, stateful_step_count=16)
