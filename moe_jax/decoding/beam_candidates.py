"""The best continuations of the beams of many requests, from the logits of a step.

The device finds the best tokens of each beam, the host merges them by request. What becomes of the
candidates is `moe_jax.decoding.beam_search`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32

from moe_jax.decoding.beam_search import BeamOptions, BeamState, Candidates


@dataclass(frozen=True)
class BeamBatch:
    """The beams of some requests, one line for each that exists, then padding.

    Attributes:
      states, options: of each request.
      row: the row of the step's logits that belongs to a beam.
      forbidden: ids that it must not choose in this step, padded with -1.
      repetition_penalty: see BeamOptions.
      count: how many candidates a line needs at most.
    """

    states: tuple[BeamState, ...]
    options: tuple[BeamOptions, ...]
    row: Int32[np.ndarray, " lines"]
    forbidden: Int32[np.ndarray, "lines ids"]
    repetition_penalty: Float32[np.ndarray, " lines"]
    count: int


@dataclass(frozen=True)
class Continuations:
    """The best tokens of every line of a batch, on the device: likeliest first, -inf where none."""

    batch: BeamBatch
    log_probability: Float32[Array, "lines candidates"]
    token: Int32[Array, "lines candidates"]


def stack_beams(
    states: Sequence[BeamState],
    options: Sequence[BeamOptions],
    rows: Sequence[Sequence[int] | Int[np.ndarray, " beams"]],
) -> BeamBatch:
    """The beams of these requests.

    Lines, ids and candidates are padded to powers of two, so that few programs serve all.

    Args:
      rows: of each request, the row of the step's logits of each beam. In the first step only the
        first beam exists, and the others may name any row.
    """
    existing = [state.scores > -np.inf for state in states]
    ends = max(len(option.eos) for option in options)
    lines = _power_of_two(sum(int(exists.sum()) for exists in existing))
    row = np.zeros(lines, np.int32)
    forbidden = np.full((lines, _power_of_two(ends)), -1, np.int32)
    repetition_penalty = np.ones(lines, np.float32)
    first = 0
    for state, option, exists, own in zip(states, options, existing, rows, strict=True):
        line = slice(first, first + int(exists.sum()))
        row[line] = np.asarray(own, np.int32)[exists]
        if state.tokens.shape[1] < option.min_tokens:
            forbidden[line, : len(option.eos)] = sorted(option.eos)
        repetition_penalty[line] = option.repetition_penalty
        first = line.stop
    count = _power_of_two(max(_enough(option) for option in options))
    return BeamBatch(tuple(states), tuple(options), row, forbidden, repetition_penalty, count)


def beam_candidates(
    logits: Float32[Array | np.ndarray, "rows vocab"],
    batch: BeamBatch,
    seen: Bool[Array | np.ndarray, "rows vocab"] | None = None,
) -> Continuations:
    """Starts the search for the best tokens of every beam; `by_request` waits for it.

    As in transformers, penalty and forbidden ids act on log-probabilities, which are not normalised
    again.

    Args:
      logits: of the step; other rows than the beams' are not read.
      seen: which tokens the text of each row holds, prompt included; None where no request has a
        repetition penalty.
    """
    log_p, token = best_tokens(
        logits, batch.row, batch.forbidden, batch.repetition_penalty, seen, count=batch.count
    )
    return Continuations(batch, log_p, token)


def by_request(found: Continuations) -> list[Candidates]:
    """The candidates of each request, best first.

    They are num_beams x (1 + eos) or all there are, so that enough go on when every beam could end
    in every way. Among equals the lower beam comes first, then the likelier, then the lower token.
    Where the logits of a beam hold NaN or +inf, the scores are NaN, and `advance` raises.
    """
    log_p, token = jax.device_get((found.log_probability, found.token))
    candidates = []
    first = 0
    for state, option in zip(found.batch.states, found.batch.options, strict=True):
        scores = state.scores[state.scores > -np.inf]
        line = slice(first, first + len(scores))
        total = (scores[:, None] + log_p[line]).ravel()
        best = np.argsort(-total, kind="stable")[: _enough(option)]
        score = np.full(len(best), np.nan, np.float32) if np.isnan(total).any() else total[best]
        beam = (best // log_p.shape[1]).astype(np.int32)
        candidates.append(Candidates(score, beam, token[line].ravel()[best]))
        first = line.stop
    return candidates


@functools.partial(jax.jit, static_argnames="count")
def best_tokens(
    logits: Float32[Array, "rows vocab"],
    row: Int32[Array, " lines"],
    forbidden: Int32[Array, "lines ids"],
    repetition_penalty: Float32[Array, " lines"],
    seen: Bool[Array, "rows vocab"] | None,
    *,
    count: int,
) -> tuple[Float32[Array, "lines candidates"], Int32[Array, "lines candidates"]]:
    """The log-probabilities of the best tokens of some rows, best first, and the tokens.

    There are `count`, or the whole vocabulary; lower tokens come first among equals. Where a row
    holds NaN or +inf, all are NaN.
    """
    vocab = logits.shape[-1]
    log_p = jax.nn.log_softmax(logits[row], axis=-1)
    broken = jnp.isnan(log_p).any(axis=-1, keepdims=True)
    if seen is not None:
        log_p = jnp.where(seen[row], log_p * repetition_penalty[:, None], log_p)
    named = (jnp.arange(vocab)[None, :, None] == forbidden[:, None, :]).any(axis=-1)
    best, token = jax.lax.top_k(jnp.where(named, -jnp.inf, log_p), min(count, vocab))
    return jnp.where(broken, jnp.nan, best), token


def _enough(options: BeamOptions) -> int:
    return options.num_beams * max(2, 1 + len(options.eos))


def _power_of_two(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()
