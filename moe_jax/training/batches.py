"""Training batches: documents in random order, end to end, cut into rows of equal length.

Knows token ids only. All randomness comes from the generator it is given.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int


def leading_whitespace_splits(vocab: Mapping[str, int]) -> Int[np.ndarray, "vocab 2"]:
    """For each token that starts with whitespace: that character's id and the id of the rest.

    Rows of tokens that cannot be split so are (-1, -1). The vocabulary is byte-level: Ġ is a
    space, Ċ a line end.
    """
    pairs = np.full((len(vocab), 2), -1, np.int32)
    for text, token in vocab.items():
        if len(text) > 1 and text[0] in "ĠĊ" and text[1:] in vocab:
            pairs[token] = vocab[text[0]], vocab[text[1:]]
    return pairs


def split_some(
    tokens: Int[np.ndarray, " tokens"],
    pairs: Int[np.ndarray, "vocab 2"],
    part: float,
    generator: np.random.Generator,
) -> Int[np.ndarray, " more_tokens"]:
    """Splits off the leading whitespace of a part of the tokens that have any.

    A prompt that ends in a space or a line end is then nothing new to the model.
    """
    chosen = (pairs[tokens, 0] >= 0) & (generator.random(tokens.size) < part)
    wide = np.repeat(tokens, 1 + chosen)
    first = np.flatnonzero(chosen) + np.arange(chosen.sum())
    wide[first] = pairs[tokens[chosen], 0]
    wide[first + 1] = pairs[tokens[chosen], 1]
    return wide


def epoch_rows(
    documents: Sequence[Int[np.ndarray, " tokens"]],
    length: int,
    pairs: Int[np.ndarray, "vocab 2"],
    part: float,
    generator: np.random.Generator,
) -> Int[np.ndarray, "rows positions"]:
    """One pass over all documents as shuffled rows of `length` tokens; the remainder is dropped."""
    order = generator.permutation(len(documents))
    tokens = np.concatenate([documents[index] for index in order])
    tokens = split_some(tokens, pairs, part, generator)
    # Another cut every time: a row's first tokens have nothing before them to learn from.
    tokens = tokens[generator.integers(length) :]
    rows = tokens[: tokens.size // length * length].reshape(-1, length)
    return generator.permutation(rows)


def batches(
    documents: Sequence[Int[np.ndarray, " tokens"]],
    *,
    seqs: int,
    length: int,
    pairs: Int[np.ndarray, "vocab 2"],
    part: float,
    seed: int,
) -> Iterator[Int[np.ndarray, "seqs positions"]]:
    """Endless batches [seqs, length], epoch after epoch.

    Raises:
      ValueError: an epoch is shorter than one batch.
    """
    generator = np.random.default_rng(seed)
    rest = np.empty((0, length), np.int32)
    while True:
        rows = epoch_rows(documents, length, pairs, part, generator)
        if not rows.size:
            raise ValueError(f"the documents hold fewer than {2 * length} tokens; use more text")
        rest = np.concatenate([rest, rows.astype(np.int32)])
        whole = len(rest) // seqs * seqs
        yield from rest[:whole].reshape(-1, seqs, length)
        rest = rest[whole:]
