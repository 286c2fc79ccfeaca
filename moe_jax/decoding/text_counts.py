"""Which tokens a text holds and how often, on the device, for the penalties that ask for it.

Knows no penalty and no request; a row belongs to whoever set it last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32


@no_type_check  # jax rebuilds it with shapes and shardings in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextCounts:
    """The tokens of the texts of all rows.

    Attributes:
      in_prompt: whether the prompt holds the token.
      generated: how often it was generated.
    """

    in_prompt: Bool[Array, "rows vocab"]
    generated: Int32[Array, "rows vocab"]


def empty_text_counts(rows: int, vocab: int) -> TextCounts:
    """Counts of texts without tokens: five bytes per row and token of the vocabulary."""
    return TextCounts(jnp.zeros((rows, vocab), bool), jnp.zeros((rows, vocab), jnp.int32))


def pad_tokens(tokens: Sequence[int], vocab: int) -> Int32[np.ndarray, " positions"]:
    """The tokens and as many times `vocab` as a round length needs.

    There are few such lengths (64, 512, 4096, ...), so that `set_row` is compiled few times.
    """
    length = 64
    while length < len(tokens):
        length *= 8
    padded = np.full(length, vocab, np.int32)
    padded[: len(tokens)] = tokens
    return padded


@partial(jax.jit, donate_argnames="counts")
def set_row(
    counts: TextCounts,
    row: Int[Array, ""] | int,
    prompt: Int[Array, " prompt_tokens"],
    generated: Int[Array, " generated_tokens"],
) -> TextCounts:
    """Replaces a row by the tokens of this text; `counts` is donated.

    Entries of `prompt` and `generated` that are `vocab` (see `pad_tokens`) count as none.
    """
    vocab = counts.in_prompt.shape[1]
    held = jnp.zeros(vocab, bool).at[prompt].set(True, mode="drop")
    number = jnp.zeros(vocab, jnp.int32).at[generated].add(1, mode="drop")
    return TextCounts(
        counts.in_prompt.at[row].set(held, mode="drop"),
        counts.generated.at[row].set(number, mode="drop"),
    )


def count_tokens(
    counts: TextCounts, row: Int[Array, " seqs"], token: Int32[Array, " seqs"]
) -> TextCounts:
    """Adds one generated token to each of these rows; a row past the last one is none."""
    return TextCounts(counts.in_prompt, counts.generated.at[row, token].add(1, mode="drop"))
