"""Chooses the next token of every sequence from its logits.

Knows no engine: a row of the batch sees only its own logits, options, counts and position, so a
request draws the same tokens alone and in any batch.
"""

from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Int32, UInt32

from moe_jax.decoding.filters import filter_logits
from moe_jax.decoding.logit_edits import edit_logits
from moe_jax.decoding.sampling_options import SamplingOptions
from moe_jax.decoding.text_counts import TextCounts, count_tokens


@no_type_check  # jax rebuilds it with shapes and shardings in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """The chosen tokens.

    Log-probabilities are those of the model itself: log-softmax of the unmodified logits. Where a
    row of logits holds NaN or +inf, or every token is forbidden, the log-probability of the chosen
    token is NaN and the token means nothing; the engine raises.

    Attributes:
      top_tokens: the likeliest tokens of the model, highest first; of equal ones the lowest id.
    """

    token: Int32[Array, " seqs"]
    logprob: Float32[Array, " seqs"]
    top_tokens: Int32[Array, "seqs top"]
    top_logprobs: Float32[Array, "seqs top"]


@partial(jax.jit, static_argnames="top", donate_argnames="counts")
def sample(
    logits: Float32[Array, "seqs vocab"],
    options: SamplingOptions,
    position: Int[Array, " seqs"],
    counts: TextCounts | None,
    row: Int[Array, " seqs"],
    new_tokens: Int[Array, " seqs"],
    allowed: Bool[Array, "seqs vocab"] | None = None,
    top: int = 0,
) -> tuple[Sampled, TextCounts | None]:
    """Draws a token per sequence; the likeliest where the temperature is 0.

    Gumbel-max (Gumbel 1954; Maddison et al. 2014): the largest of logit + Gumbel noise is a draw
    from the softmax. The noise comes from the request's seed and the token's position alone.

    A program is compiled for each `top` (see `top_width`), for masks or none, and for what the
    options use: draws (none, unfiltered, filtered), penalties, biases (none, 16, 300).

    Args:
      position: place of the drawn token in its sequence; a new one each step.
      counts: the tokens of all texts; DONATED. None will do where options.counts is False.
      row: place of each sequence in `counts`; one past the last (padding, or a request without
        penalties) is neither read nor counted.
      new_tokens: tokens generated so far.
      allowed: the tokens that may come; None: all.
      top: how many of the likeliest tokens to report.

    Returns:
      What was chosen, and the counts with the chosen tokens.
    """
    edited = edit_logits(logits, options, counts, row, new_tokens, allowed)
    token = _likeliest(edited)
    if options.draws:
        noise = jax.vmap(lambda seed, place: _noise(seed, place, logits.shape[-1]))(
            options.seed, position
        )
        drawn = _likeliest(filter_logits(edited, options) + noise)
        token = jnp.where(options.temperature > 0, drawn, token)
    possible = jnp.take_along_axis(edited, token[:, None], axis=-1)[:, 0] > -jnp.inf
    if options.counts:
        assert counts is not None, "penalties need the counts of the texts"
        counts = count_tokens(counts, row, token)
    return _sampled(logits, token, possible, top), counts


@partial(jax.jit, static_argnames="top")
def sample_greedy(logits: Float32[Array, "seqs vocab"], top: int = 0) -> Sampled:
    """`sample` for a batch of requests that are all `plain_greedy`: no change, no noise.

    Among equal logits the lowest id wins. The caller chooses it in Python: a branch inside the
    program would stall the launch on a GPU.
    """
    token = _likeliest(logits)
    return _sampled(logits, token, jnp.ones(token.shape, bool), top)


def _likeliest(logits: Float32[Array, "seqs vocab"]) -> Int32[Array, " seqs"]:
    """The lowest of the ids with the largest logit; any id where a logit is NaN.

    Two plain reductions, which XLA:CPU vectorises; an argmax it does not.
    """
    largest = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(logits == largest, ids, ids[-1]), axis=-1)


def _sampled(
    logits: Float32[Array, "seqs vocab"],
    token: Int32[Array, " seqs"],
    possible: Bool[Array, " seqs"],
    top: int,
) -> Sampled:
    total = jax.nn.logsumexp(logits, axis=-1)
    total = jnp.where(jnp.isfinite(total), total, jnp.nan)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - total
    # Without `top` the shapes of the results are the same but for their width.
    values, tokens = jax.lax.top_k(logits, top)
    return Sampled(token, jnp.where(possible, chosen, jnp.nan), tokens, values - total[:, None])


def _noise(seed: UInt32[Array, ""], position: Int[Array, ""], vocab: int) -> Float32[Array, " _"]:
    # Threefry by name: other generators may give a row different bits in a different batch.
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,), jnp.float32)
