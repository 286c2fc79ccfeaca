"""Generated tasks that need the context: a hidden key, many pairs, one name in two chunks, a copy.

A text is a list of pieces, each of which is given or is an answer. In a question for a test the one
answer comes last; in training there are several. Knows token ids only through the function that
encodes. Everything is drawn from the generator that is passed in; names and numbers of the test
split never occur in the training split.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

Encode = Callable[[str], Sequence[int]]
Split = Literal["train", "test"]

# A fifth of all names and numbers are for tests.
_PARTS = 5
# Halves of names, each a single token of the reference model's tokenizer.
_HEADS = (
    "new val ref doc bug top sen raw pos bar bin cor mem num gen way dir lib bad cal pat per cap "
    "map sub mon mod max day bet sup min buf dis cur key fin wid reg zip dif sig col tag con may "
    "len log"
)
_TAILS = (
    "red men mag res wor mal mem lic len mac boo lim clu bug cep med row log tes ten loc dev rou "
    "der box ren vel quo tem ded sel den ved roy ver ven win rea que del set wap zer dit"
)
_TEAMS = "red blue green black white gold silver brown"


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of a text; `answer`: whether they can be known from what is before."""

    tokens: tuple[int, ...]
    answer: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the tokens that must follow it.

    Attributes:
      chunks: where each chunk of the prompt begins; they follow one another. Empty: it has none.
      end: where the last chunk ends, and the question begins.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    chunks: tuple[int, ...] = ()
    end: int = 0


def is_for_tests(text: str) -> bool:
    """Whether a name or number belongs to the test split."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % _PARTS == 0


def draw_names(
    count: int, split: Split, generator: np.random.Generator, distinct: bool = False
) -> list[str]:
    """Different made-up names of that split; `distinct`: no two share their first half.

    Raises ValueError for more than can be drawn soon.
    """
    most = len(_HEADS.split()) if distinct else 300
    if count > most:
        raise ValueError(f"{count} different names were asked for; at most {most} can be drawn")
    names: list[str] = []
    heads: set[str] = set()
    while len(names) < count:
        head, tail = generator.choice(_HEADS.split()), generator.choice(_TAILS.split())
        name = f"{head}{tail}"
        new = name not in names and not (distinct and head in heads)
        if new and is_for_tests(name) == (split == "test"):
            names.append(name)
            heads.add(str(head))
    return names


def draw_number(digits: int, split: Split, generator: np.random.Generator) -> str:
    """A number of that many digits and that split."""
    while True:
        number = str(generator.integers(10 ** (digits - 1), 10**digits))
        if is_for_tests(number) == (split == "test"):
            return number


def passkey(
    encode: Encode,
    filler: Int[np.ndarray, " tokens"],
    hidden: Sequence[float],
    asked: Sequence[float],
    split: Split,
    generator: np.random.Generator,
) -> list[Piece]:
    """Text with pass keys hidden in it, and questions for them.

    Args:
      filler: tokens of real text.
      hidden: the depth of each key in it, from 0 to 1.
      asked: the depth of its question, from its key's to 1, which is the end.

    Raises:
      ValueError: a depth is out of bounds, or there are too many keys.
    """
    for depth, end in zip(hidden, asked, strict=True):
        if not 0 <= depth <= end <= 1:
            raise ValueError(
                f"a key at depth {depth} cannot be asked at {end}; both lie between 0 and 1, the "
                "question not before its key"
            )
    names = draw_names(len(hidden), split, generator)
    insertions: list[tuple[int, list[Piece]]] = []
    for name, depth, end in zip(names, hidden, asked, strict=True):
        key = draw_number(5, split, generator)
        needle = [_given(encode, f"\n# The pass key of {name} is {key}.\n")]
        question = _asks(encode, f"\n# The pass key of {name} is", f" {key}")
        insertions.append((int(depth * len(filler)), needle))
        insertions.append((int(end * len(filler)), question))
    pieces, place = [], 0
    for at, inserted in sorted(insertions, key=lambda one: one[0]):
        pieces += [Piece(tuple(filler[place:at].tolist())), *inserted]
        place = at
    return [*pieces, Piece(tuple(filler[place:].tolist()))]


def recall(
    encode: Encode, pairs: int, questions: int, split: Split, generator: np.random.Generator
) -> list[Piece]:
    """A table of names and their ports, some of which are asked.

    Raises ValueError for more questions than pairs, or more pairs than there are names.
    """
    if not 0 < questions <= pairs:
        raise ValueError(f"{questions} questions cannot be asked about {pairs} pairs")
    names = draw_names(pairs, split, generator)
    ports = [draw_number(4, split, generator) for _ in names]
    lines = "".join(
        f"# port of {name} is {port}\n" for name, port in zip(names, ports, strict=True)
    )
    pieces = [_given(encode, "\n# The ports:\n" + lines + "# Questions:")]
    for one in generator.permutation(pairs)[:questions]:
        pieces += _asks(encode, f"\n# port of {names[one]} is", f" {ports[one]}")
    return pieces


def cross_chunk(
    encode: Encode,
    chunks: int,
    members: int,
    filler: Sequence[Int[np.ndarray, " _"]],
    split: Split,
    generator: np.random.Generator,
) -> list[Piece]:
    """Chunks that each name a team's members, and the question for the one who is in two teams.

    What is asked stands in no chunk. Read one after another, the second mention can be known for
    one when it is read; chunks that have not seen one another hold nothing that tells it from the
    other names. The order of the chunks is random.

    Args:
      chunks: 2 to 8.
      members: names in each; all together at most 49.
      filler: for each chunk, tokens of real text that come before its names.

    Raises:
      ValueError: chunks or members are too few or too many.
    """
    if not 2 <= chunks <= len(_TEAMS.split()) or members < 1:
        raise ValueError(
            f"{chunks} chunks with {members} names each cannot be made; there must be 2 to "
            f"{len(_TEAMS.split())} chunks, and a name in each"
        )
    names = draw_names(chunks * members - 1, split, generator, distinct=True)
    both, rest = names[0], names[1:]
    first, second = generator.choice(chunks, 2, replace=False)
    teams = generator.permutation(_TEAMS.split())[:chunks]
    pieces = []
    for chunk in range(chunks):
        count = members - (chunk in (first, second))
        inside = [rest.pop() for _ in range(count)] + [both] * (members - count)
        line = " ".join(generator.permutation(inside))
        team = _given(encode, f"\n# Team {teams[chunk]}: {line}\n")
        pieces.append(Piece((*filler[chunk].tolist(), *team.tokens)))
    return [*pieces, *_asks(encode, "\n# In two teams:", f" {both}")]


def copying(
    encode: Encode, length: int, split: Split, generator: np.random.Generator
) -> list[Piece]:
    """A list of names, twice; the second time its names are the answer."""
    line = " ".join(draw_names(length, split, generator))
    return _asks(encode, f"\n# A list: {line}\n# Again:", f" {line}")


def as_question(pieces: Sequence[Piece], start: Sequence[int] = (), chunks: int = 0) -> Question:
    """The text as a prompt whose last piece is the answer.

    Args:
      start: tokens before the text; they belong to its first chunk.
      chunks: how many of the first pieces are chunks.
    """
    *given, answer = [piece for piece in pieces if piece.tokens]
    ends = [len(start) + int(end) for end in np.cumsum([len(piece.tokens) for piece in given])]
    return Question(
        prompt=(*start, *(token for piece in given for token in piece.tokens)),
        answer=answer.tokens,
        chunks=(0, *ends[: chunks - 1]) if chunks else (),
        end=ends[chunks - 1] if chunks else 0,
    )


def fillers(
    tokens: Int[np.ndarray, " tokens"], length: int, generator: np.random.Generator
) -> Iterator[Int[np.ndarray, " length"]]:
    """Endless pieces of that length from anywhere in a longer text."""
    while True:
        start = int(generator.integers(len(tokens) - length + 1))
        yield tokens[start : start + length]


def _given(encode: Encode, text: str) -> Piece:
    return Piece(tuple(encode(text)))


def _asks(encode: Encode, question: str, answer: str) -> list[Piece]:
    """An answer is what its tokens are after the question: on its own it may begin otherwise."""
    given, both = tuple(encode(question)), tuple(encode(question + answer))
    if both[: len(given)] != given or len(both) == len(given):
        raise ValueError(
            f"the tokenizer joins {question!r} and {answer!r} into tokens of both, so the answer "
            "cannot be asked for; these tasks need a tokenizer that splits at spaces"
        )
    return [Piece(given), Piece(both[len(given) :], answer=True)]
