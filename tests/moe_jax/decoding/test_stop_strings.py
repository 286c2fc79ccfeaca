import hypothesis
import hypothesis.strategies as st
import pytest

from moe_jax.decoding.stop_strings import StopScanner


def run(stops, pieces):
    """Everything shown, whether a stop string was found, and what was shown before the flush."""
    scanner = StopScanner(stops)
    shown = ""
    for piece in pieces:
        text, found = scanner.push(piece)
        shown += text
        if found:
            assert scanner.flush() == ""
            return shown, True, shown
    return shown + scanner.flush(), False, shown


def stop_plainly(stops, text):
    """The definition: the first end of a stop string, and of those ending there the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@hypothesis.settings(derandomize=True, deadline=None, max_examples=300)
@hypothesis.given(
    stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abé", max_size=4), max_size=10),
)
def test_equals_the_definition_however_the_text_is_cut(stops, pieces):
    text = "".join(pieces)
    shown, found, before_flush = run(stops, pieces)
    assert (shown, found) == stop_plainly(stops, text)
    if not found:
        starts = {stop[:n] for stop in stops for n in range(1, len(stop))}
        longest = max((len(s) for s in starts if text.endswith(s)), default=0)
        assert len(before_flush) == len(text) - longest


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["\n\n"], ["one\n", "two\n", "\nthree"], ("one\ntwo", True)),
        (["END"], ["the E", "N", "emy"], ("the ENemy", False)),
        (["aab"], ["a", "a", "a", "b"], ("a", True)),
        (["abcd", "c"], ["abcd"], ("ab", True)),
        (["bc", "abc"], ["xabcx"], ("x", True)),
        ([], ["a", "b"], ("ab", False)),
    ],
)
def test_examples(stops, pieces, expected):
    assert run(stops, pieces)[:2] == expected


def test_nothing_passes_after_a_stop():
    scanner = StopScanner(["."])
    assert scanner.push("a.b") == ("a", True)
    assert scanner.push("c") == ("", True)
    assert scanner.flush() == ""
