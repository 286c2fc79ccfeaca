"""Rows to train on: text, and tasks that need what stands earlier in the row.

A row comes with the importance of each of its targets. What a step trains on depends on the seed
and the step alone, so a run that is taken up again goes on as if it had never stopped.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int

from moe_jax.evaluate.data import Encode, Piece, copying, cross_chunk, fillers, passkey, recall
from moe_jax.training.whitespace import split_some

# The answers are a few tokens among thousands.
ANSWER = 4.0


@dataclass(frozen=True)
class RowMix:
    """Parts of what is trained on; the parts of each sum to 1.

    Attributes:
      lengths: of steps by the length of their rows.
      kinds: of rows by what they are.
      from_start: of rows with pass keys, those whose first key stands at the very start and is
        asked at the very end.
      near_start: of the other keys in those, the ones that stand in the first twentieth and are
        asked at the very end too.
      at_once: of all keys but those, the ones that are asked right behind themselves.
      keys: how many times as many keys as in "all".
    """

    lengths: Mapping[int, float]
    kinds: Mapping[str, float]
    from_start: float = 0.0
    near_start: float = 0.0
    at_once: float = 0.0
    keys: int = 1


_KEYS = {"text": 0.4, "passkey": 0.4, "recall": 0.06, "cross_chunk": 0.1, "copying": 0.04}
_LONG = {1024: 0.2, 4096: 0.8}
# Most rows are short; long ones are for what must be found far back. The others are for the end
# of a training, and have more of the latter.
MIXES = {
    "all": RowMix(
        lengths={1024: 0.6, 2048: 0.2, 4096: 0.2},
        kinds={"text": 0.46, "passkey": 0.24, "recall": 0.1, "cross_chunk": 0.16, "copying": 0.04},
    ),
    "far": RowMix(
        lengths={1024: 0.3, 2048: 0.2, 4096: 0.5},
        kinds=_KEYS,
        from_start=0.5,
    ),
    "farthest": RowMix(
        lengths=_LONG,
        kinds=_KEYS,
        from_start=0.7,
        near_start=0.6,
    ),
    "ends": RowMix(
        lengths=_LONG,
        kinds=_KEYS,
        from_start=0.6,
        near_start=0.35,
        at_once=0.35,
    ),
    "many": RowMix(
        lengths=_LONG,
        kinds={"text": 0.3, "passkey": 0.5, "recall": 0.06, "cross_chunk": 0.1, "copying": 0.04},
        from_start=0.6,
        near_start=0.15,
        at_once=0.7,
        keys=4,
    ),
}


@dataclass(frozen=True)
class TrainingText:
    """What rows are made of.

    Attributes:
      tokens: all documents end to end, an end of text after each.
      encode: text to token ids.
      end_of_text: what stands between texts.
      splits: see `leading_whitespace_splits`.
      split_part: the part of tokens whose leading whitespace is split off.
    """

    tokens: Int[np.ndarray, " tokens"]
    encode: Encode
    end_of_text: int
    splits: Int[np.ndarray, "vocab 2"]
    split_part: float


Row = tuple[Int[np.ndarray, " length"], Float32[np.ndarray, " length"]]


def step_rows(
    text: TrainingText, batch_tokens: int, seed: int, step: int, mix: RowMix
) -> tuple[Int[np.ndarray, "seqs length"], Float32[np.ndarray, "seqs positions"]]:
    """The rows [seqs, positions + 1] of a step and the importance of their last positions."""
    generator = np.random.default_rng([seed, step])
    lengths = [length for length in mix.lengths if length <= batch_tokens]
    chances = np.array([mix.lengths[length] for length in lengths])
    positions = int(generator.choice(lengths, p=chances / chances.sum()))
    rows = [_row(text, positions + 1, generator, mix) for _ in range(batch_tokens // positions)]
    tokens = np.stack([row for row, _ in rows]).astype(np.int32)
    importance = np.stack([importance for _, importance in rows])
    return tokens, importance[:, 1:]


def _row(text: TrainingText, length: int, generator: np.random.Generator, mix: RowMix) -> Row:
    kind = generator.choice(list(mix.kinds), p=list(mix.kinds.values()))
    more = fillers(text.tokens, length, generator)
    if kind == "text":
        window = split_some(next(more), text.splits, text.split_part, generator)
        return window[:length], np.ones(length, np.float32)
    if kind == "passkey":
        return _weigh(_passkeys(text, length, generator, mix), 1.0, length)
    make: Callable[[], list[Piece]] = {
        "recall": lambda: _recall(text, generator),
        "cross_chunk": lambda: _cross_chunk(text, more, generator),
        "copying": lambda: copying(text.encode, int(generator.integers(3, 25)), "train", generator),
    }[str(kind)]
    pieces: list[Piece] = []
    while sum(len(piece.tokens) for piece in pieces) < length:
        pieces += [Piece((text.end_of_text,)), *make()]
    return _weigh(pieces, 0.0, length)


def _passkeys(
    text: TrainingText, length: int, generator: np.random.Generator, mix: RowMix
) -> list[Piece]:
    count = mix.keys * int(generator.integers(1, 3 + length // 512))
    hidden = generator.uniform(0, 0.9, count)
    # Half of them are asked at the end, as far away as can be.
    soon = generator.random(count) < 0.5
    asked = np.where(soon, hidden + (1 - hidden) * generator.uniform(0, 1, count), 1.0)
    if mix.at_once:
        asked = np.where(generator.random(count) < mix.at_once, hidden, asked)
    if mix.from_start and generator.random() < mix.from_start:
        if mix.near_start:
            near = generator.random(count) < mix.near_start
            hidden[near], asked[near] = generator.uniform(0, 0.05, near.sum()), 1.0
        hidden[0], asked[0] = 0.0, 1.0
    filler = next(fillers(text.tokens, length - 40 * count, generator))
    return passkey(text.encode, filler, hidden.tolist(), asked.tolist(), "train", generator)


def _recall(text: TrainingText, generator: np.random.Generator) -> list[Piece]:
    pairs = int(generator.integers(2, 41))
    return recall(text.encode, pairs, min(pairs, 12), "train", generator)


def _cross_chunk(
    text: TrainingText, more: Iterator[np.ndarray], generator: np.random.Generator
) -> list[Piece]:
    chunks, members = int(generator.integers(2, 7)), int(generator.integers(2, 6))
    longest = int(generator.choice([1, 80]))
    filler = [next(more)[: generator.integers(longest)] for _ in range(chunks)]
    return cross_chunk(text.encode, chunks, members, filler, "train", generator)


def _weigh(pieces: list[Piece], given: float, length: int) -> Row:
    tokens = np.concatenate([np.asarray(piece.tokens, np.int32) for piece in pieces])[:length]
    importance = np.concatenate(
        [np.full(len(piece.tokens), ANSWER if piece.answer else given) for piece in pieces]
    )[:length]
    missing = length - tokens.size
    return (
        np.pad(tokens, (0, missing)),
        np.pad(importance.astype(np.float32), (0, missing)),
    )
