"""Chooses the next token of every sequence from its logits.

Knows no engine: a row of the batch sees only its own logits, options and position, so a request
draws the same tokens alone and in any batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, Num, UInt32

from moe_jax.decoding.sampling_params import SamplingParams


@no_type_check  # jax rebuilds it with shapes and shardings in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingOptions:
    """The sampling numbers of a batch, one entry per sequence; see SamplingParams.

    top_k is the size of the vocabulary where the request gave none.
    """

    temperature: Float32[Array, " seqs"]
    top_k: Int32[Array, " seqs"]
    top_p: Float32[Array, " seqs"]
    min_p: Float32[Array, " seqs"]
    repetition_penalty: Float32[Array, " seqs"]
    seed: UInt32[Array, " seqs"]


def stack_options(params: Sequence[SamplingParams], vocab: int) -> SamplingOptions:
    """The options of a batch whose rows are these requests."""
    temperature = np.array([p.temperature for p in params], np.float32)
    # Subnormals count as zero on most devices: there, dividing by one would give NaN.
    temperature[temperature < np.finfo(np.float32).tiny] = 0
    top_k = [vocab if p.top_k is None else min(p.top_k, vocab) for p in params]
    return SamplingOptions(
        temperature=jnp.asarray(temperature),
        top_k=jnp.asarray(np.array(top_k, np.int32)),
        top_p=jnp.asarray(np.array([p.top_p for p in params], np.float32)),
        min_p=jnp.asarray(np.array([p.min_p for p in params], np.float32)),
        repetition_penalty=jnp.asarray(
            np.array([p.repetition_penalty for p in params], np.float32)
        ),
        seed=jnp.asarray(np.array([p.seed for p in params], np.uint32)),
    )


@jax.jit
def sample(
    logits: Float32[Array, "seqs vocab"],
    options: SamplingOptions,
    position: Int[Array, " seqs"],
    seen: Bool[Array, "seqs vocab"],
) -> tuple[Int32[Array, " seqs"], Float32[Array, " seqs"]]:
    """Draws a token per sequence; the likeliest where the temperature is 0.

    Gumbel-max (Gumbel 1954; Maddison et al. 2014): the largest of logit + Gumbel noise is a draw
    from the softmax. The noise comes from the request's seed and the token's position alone.

    Args:
      position: place of the drawn token in its sequence; a new one each step.
      seen: which tokens the prompt or the text so far holds, for the repetition penalty.

    Returns:
      Tokens, and their log-probabilities under the model itself (log-softmax of the unmodified
      logits). Where a row of logits holds NaN or +inf, its log-probability is NaN and its token
      means nothing; the engine raises.
    """
    greedy = jnp.argmax(_penalise(logits, options, seen), axis=-1)
    noise = jax.vmap(lambda seed, place: _noise(seed, place, logits.shape[-1]))(
        options.seed, position
    )
    drawn = jnp.argmax(filter_logits(logits, options, seen) + noise, axis=-1)
    token = jnp.where(options.temperature > 0, drawn, greedy).astype(jnp.int32)
    return token, _log_probability(logits, token)


@jax.jit
def sample_greedy(
    logits: Float32[Array, "seqs vocab"],
) -> tuple[Int32[Array, " seqs"], Float32[Array, " seqs"]]:
    """`sample` for a batch of temperature 0 and repetition penalty 1: no filter, no noise.

    Among equal logits the lowest id wins. The caller chooses it in Python: a branch inside the
    program would stall the launch on a GPU.
    """
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return token, _log_probability(logits, token)


def filter_logits(
    logits: Float32[Array, "seqs vocab"],
    options: SamplingOptions,
    seen: Bool[Array, "seqs vocab"],
) -> Float32[Array, "seqs vocab"]:
    """The logits whose softmax is drawn from; -inf for tokens that cannot be drawn.

    In the order of transformers: repetition penalty (Keskar et al. 2019), temperature, top-k
    (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024). The largest is
    always kept and is 0. Tokens as likely as the last one kept are kept too. A temperature of 0
    counts as 1.
    """
    penalised = _penalise(logits, options, seen)
    temperature = jnp.where(options.temperature > 0, options.temperature, 1)[:, None]
    # Less the largest before the division, so that a small temperature cannot overflow.
    scaled = (penalised - jnp.max(penalised, axis=-1, keepdims=True)) / temperature
    rank = _ordered_bits(scaled)
    weight = jnp.exp(scaled)

    last_k = _lower_cutoff(rank, jnp.ones_like(rank, jnp.int32), scaled.shape[-1] - options.top_k)
    weight_k = jnp.where(rank >= last_k[:, None], weight, 0)
    removable = (1 - options.top_p) * jnp.sum(weight_k, axis=-1)
    last_p = jnp.where(options.top_p < 1, _lower_cutoff(rank, weight_k, removable), 0)
    last = jnp.minimum(jnp.maximum(last_k, last_p), jnp.max(rank, axis=-1))

    kept = (rank >= last[:, None]) & (weight >= options.min_p[:, None])
    return jnp.where(kept, scaled, -jnp.inf)


def _penalise(
    logits: Float32[Array, "seqs vocab"],
    options: SamplingOptions,
    seen: Bool[Array, "seqs vocab"],
) -> Float32[Array, "seqs vocab"]:
    penalty = options.repetition_penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def _log_probability(
    logits: Float32[Array, "seqs vocab"], token: Int32[Array, " seqs"]
) -> Float32[Array, " seqs"]:
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    total = jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(jnp.isfinite(total), chosen - total, jnp.nan)


def _noise(seed: UInt32[Array, ""], position: Int[Array, ""], vocab: int) -> Float32[Array, " _"]:
    # Threefry by name: other generators may give a row different bits in a different batch.
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,), jnp.float32)


def _ordered_bits(x: Float32[Array, "seqs vocab"]) -> UInt32[Array, "seqs vocab"]:
    """Unsigned integers in the same order as the numbers; both zeros are equal."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, jnp.zeros_like(x), x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _lower_cutoff(
    rank: UInt32[Array, "seqs vocab"],
    weight: Num[Array, "seqs vocab"],
    removable: Num[Array, " seqs"],
) -> UInt32[Array, " seqs"]:
    """The largest cutoff for which the weights ranked below it sum to at most `removable`.

    It is the rank of some entry, or the largest integer if everything may go. Found bit by bit
    in 32 passes over the vocabulary, where a sort takes 30 times as long (CPU, 32 k entries).
    """

    def try_bit(bit: Int[Array, ""], cutoff: UInt32[Array, " seqs"]) -> UInt32[Array, " seqs"]:
        candidate = cutoff | (jnp.uint32(1 << 31) >> bit.astype(jnp.uint32))
        below = jnp.where(rank < candidate[:, None], weight, jnp.zeros_like(weight)).sum(axis=-1)
        return jnp.where(below <= removable, candidate, cutoff)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros_like(rank[:, 0]))
