"""The sampling numbers of a batch as arrays.

Knows SamplingParams and how their numbers are padded; computes nothing with them. What a batch
uses decides what is compiled: rows without a feature cost nothing unless one beside them has it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from moe_jax.decoding.option_values import MAX_BIASES
from moe_jax.decoding.sampling_params import SamplingParams

# The widths to which logit biases and the likeliest tokens are padded: each is compiled anew.
_BIAS_WIDTHS = (16, MAX_BIASES)
_MAX_TOP = 20

_PLAIN_NUMBERS = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@no_type_check  # jax rebuilds it with shapes and shardings in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingOptions:
    """The sampling numbers of a batch, one entry per sequence; see SamplingParams.

    Attributes:
      top_k: the size of the vocabulary where the request gave none.
      bias_tokens: the tokens of the logit biases; `vocab` where there is none.
      stop_tokens: the tokens that cannot come before min_tokens; `vocab` where there is none.
      draws: whether any temperature is above 0.
      filters: whether any top_k, top_p or min_p removes tokens.
      counts: whether any penalty looks at the tokens of the text.
    """

    temperature: Float32[Array, " seqs"]
    top_k: Int32[Array, " seqs"]
    top_p: Float32[Array, " seqs"]
    min_p: Float32[Array, " seqs"]
    repetition_penalty: Float32[Array, " seqs"]
    presence_penalty: Float32[Array, " seqs"]
    frequency_penalty: Float32[Array, " seqs"]
    bias_tokens: Int32[Array, "seqs biases"]
    bias_values: Float32[Array, "seqs biases"]
    stop_tokens: Int32[Array, "seqs stops"]
    min_tokens: Int32[Array, " seqs"]
    seed: UInt32[Array, " seqs"]
    draws: bool = field(metadata={"static": True})
    filters: bool = field(metadata={"static": True})
    counts: bool = field(metadata={"static": True})


def stack_options(
    params: Sequence[SamplingParams], stop_tokens: Sequence[Collection[int]], vocab: int
) -> SamplingOptions:
    """The options of a batch whose rows are these requests.

    They are good for as long as the rows are the same. `stop_tokens` has the ids that end the text
    of each row.
    """
    assert len(params) == len(stop_tokens), f"{len(params)} rows, {len(stop_tokens)} stop tokens"
    temperature = np.array([p.temperature for p in params], np.float32)
    # Subnormals count as zero on most devices: there, dividing by one would give NaN.
    temperature[temperature < np.finfo(np.float32).tiny] = 0
    drawn = [p for p, heat in zip(params, temperature, strict=True) if heat > 0]
    edited = any(p.logit_bias or p.min_tokens for p in params)
    biases = [dict(p.logit_bias) for p in params]
    widest = max(map(len, biases), default=0)
    width = next(w for w in _BIAS_WIDTHS if w >= widest) if edited else 0
    stops = [sorted(s) if p.min_tokens else [] for p, s in zip(params, stop_tokens, strict=True)]
    arrays = {
        "temperature": temperature,
        "top_k": np.array([min(p.top_k or vocab, vocab) for p in params], np.int32),
        "bias_tokens": _padded([list(row) for row in biases], width, vocab, np.int32),
        "bias_values": _padded([list(row.values()) for row in biases], width, 0, np.float32),
        "stop_tokens": _padded(stops, _stop_width(stops) if edited else 0, vocab, np.int32),
        "min_tokens": np.array([p.min_tokens for p in params], np.int32),
        "seed": np.array([p.seed for p in params], np.uint32),
    }
    for name in _PLAIN_NUMBERS:
        arrays[name] = np.array([getattr(p, name) for p in params], np.float32)
    return SamplingOptions(
        **jax.device_put(arrays),
        draws=bool(drawn),
        filters=any(p.top_k is not None or p.top_p < 1 or p.min_p > 0 for p in drawn),
        counts=any(p.counts_tokens for p in params),
    )


def top_width(params: Sequence[SamplingParams], vocab: int) -> int:
    """The `top` of a batch: 0 where nobody wants logprobs, else the most anybody may ask for."""
    return min(_MAX_TOP, vocab) if any(p.logprobs for p in params) else 0


def _stop_width(stops: Sequence[Sequence[int]]) -> int:
    """The least power of two that holds them all, at least 4: models differ, requests seldom."""
    return max(4, 1 << (max(map(len, stops), default=0) - 1).bit_length())


def _padded(
    rows: Sequence[Sequence[int | float]], width: int, fill: int, dtype: type[np.generic]
) -> np.ndarray:
    padded = np.full((len(rows), width), fill, dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
