"""Bits per byte: how well a model, or xz, predicts text it has not seen.

Knows a model only as a function that scores tokens.
"""

import lzma
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.evaluate.corpus import Document

# Scores inputs [seqs, positions] against targets [seqs, positions]: nats of each target.
Score = Callable[[np.ndarray, np.ndarray], Array]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """What a predictor needs for a text.

    Attributes:
      bits: the length of the text under the predictor.
      size: bytes of the text.
      tokens: tokens that were scored, one end-of-text per document among them.
    """

    bits: float
    size: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte of the text."""
        return self.bits / self.size


def target_nats(
    logits: Float[Array, "seqs positions vocab"], targets: Int[Array, "seqs positions"]
) -> Float[Array, "seqs positions"]:
    """Minus the log probability of each target, float32."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]


def compress_with_model(
    score: Score,
    documents: Sequence[Document],
    encode: Callable[[str], Sequence[int]],
    *,
    end_of_text: int,
    context: int,
    seqs: int = 8,
) -> Compression:
    """Scores whole documents with a model.

    Every document stands alone: it starts after one end-of-text token and ends with the prediction
    of another, so a decoder could be built. Long documents are read in windows that overlap by
    half: past the first window every token is predicted from at least context / 2 others.

    Args:
      score: nats of every target; gets windows [seqs, context] filled up with end_of_text.
      encode: text to token ids.
      end_of_text: the id that separates documents.
      context: tokens in a window, even.
      seqs: windows in one call of score.
    """
    windows = [
        window
        for document in documents
        for window in _windows([end_of_text, *encode(document.text), end_of_text], context)
    ]
    nats, tokens = 0.0, 0
    for first in range(0, len(windows), seqs):
        batch = windows[first : first + seqs]
        inputs = np.full((seqs, context), end_of_text, np.int32)
        targets = np.full((seqs, context), end_of_text, np.int32)
        counted = np.zeros((seqs, context), bool)
        for row, (window, new) in enumerate(batch):
            length = len(window) - 1
            inputs[row, :length], targets[row, :length] = window[:-1], window[1:]
            counted[row, length - new : length] = True
        scored = np.asarray(score(inputs, targets), np.float64)
        nats += float(scored[counted].sum())
        tokens += int(counted.sum())
    size = sum(document.size for document in documents)
    return Compression(bits=nats / math.log(2), size=size, tokens=tokens)


def _windows(tokens: list[int], context: int) -> Iterator[tuple[list[int], int]]:
    """Spans of at most context + 1 tokens, and how many of each span's last tokens are new."""
    scored = min(context, len(tokens) - 1)
    yield tokens[: scored + 1], scored
    while scored < len(tokens) - 1:
        new = min(context // 2, len(tokens) - 1 - scored)
        scored += new
        yield tokens[max(0, scored - context) : scored + 1], new


def compress_with_xz(documents: Sequence[Document], *, solid: bool) -> Compression:
    """What `xz -9e` makes of the documents, as one stream (solid) or each on its own."""
    texts = [document.text.encode() for document in documents]
    streams = [b"".join(texts)] if solid else texts
    packed = sum(len(lzma.compress(s, preset=9 | lzma.PRESET_EXTREME)) for s in streams)
    return Compression(bits=8.0 * packed, size=sum(map(len, texts)), tokens=0)
