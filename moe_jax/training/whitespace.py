"""Splits leading whitespace off tokens, so that prompts that end in it are nothing new to a model.

Knows token ids only. All randomness comes from the generator it is given.
"""

from collections.abc import Mapping

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
    """Splits off the leading whitespace of a part of the tokens that have any."""
    chosen = (pairs[tokens, 0] >= 0) & (generator.random(tokens.size) < part)
    wide = np.repeat(tokens, 1 + chosen)
    first = np.flatnonzero(chosen) + np.arange(chosen.sum())
    wide[first] = pairs[tokens[chosen], 0]
    wide[first + 1] = pairs[tokens[chosen], 1]
    return wide
