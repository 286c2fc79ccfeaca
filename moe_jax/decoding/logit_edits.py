"""Changes logits by what a request asks for, before the temperature: greedy choices follow it too.

Knows nothing of how a token is drawn afterwards. A row sees only its own numbers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Int32

from moe_jax.decoding.sampling_options import SamplingOptions
from moe_jax.decoding.text_counts import TextCounts


def edit_logits(
    logits: Float32[Array, "seqs vocab"],
    options: SamplingOptions,
    counts: TextCounts | None,
    row: Int[Array, " seqs"],
    new_tokens: Int[Array, " seqs"],
    allowed: Bool[Array, "seqs vocab"] | None,
) -> Float32[Array, "seqs vocab"]:
    """The logits after all changes; -inf for tokens that cannot come.

    In the order of transformers: logit bias, repetition penalty (Keskar et al. 2019), frequency and
    presence penalty (the OpenAI API's formula, of generated tokens), stop tokens before min_tokens,
    allowed tokens.

    Args:
      counts: needed where options.counts.
      row: place of each sequence in `counts`; one past the last is a text without tokens.
      new_tokens: how many tokens each sequence has generated so far.
    """
    if options.bias_tokens.shape[1]:
        logits = jax.vmap(_add)(logits, options.bias_tokens, options.bias_values)
    if options.counts:
        assert counts is not None, "penalties need the counts of the texts"
        logits = _penalise(logits, options, counts, row)
    if options.stop_tokens.shape[1]:
        early = new_tokens < options.min_tokens
        logits = jax.vmap(_forbid)(logits, options.stop_tokens, early)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    return logits


def _add(
    logits: Float32[Array, " vocab"],
    tokens: Int32[Array, " biases"],
    values: Float32[Array, " biases"],
) -> Float32[Array, " vocab"]:
    return logits.at[tokens].add(values, mode="drop")


def _forbid(
    logits: Float32[Array, " vocab"], tokens: Int32[Array, " stops"], early: Bool[Array, ""]
) -> Float32[Array, " vocab"]:
    return logits.at[jnp.where(early, tokens, len(logits))].set(-jnp.inf, mode="drop")


def _penalise(
    logits: Float32[Array, "seqs vocab"],
    options: SamplingOptions,
    counts: TextCounts,
    row: Int[Array, " seqs"],
) -> Float32[Array, "seqs vocab"]:
    in_prompt = counts.in_prompt.at[row].get(mode="fill", fill_value=False)
    generated = counts.generated.at[row].get(mode="fill", fill_value=0)
    repetition = options.repetition_penalty[:, None]
    repeated = jnp.where(logits < 0, logits * repetition, logits / repetition)
    logits = jnp.where(in_prompt | (generated > 0), repeated, logits)
    logits -= options.frequency_penalty[:, None] * generated.astype(jnp.float32)
    return logits - jnp.where(generated > 0, options.presence_penalty[:, None], 0)
