"""What one step is given besides weights, and what every layer of it shares."""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.model.rope import rope_angles


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """The tokens of one step and the sequences they extend.

    Attributes:
      tokens: token ids, the sequences' new tokens one after another, then padding.
      query_starts: rows query_starts[s] up to query_starts[s + 1] are new tokens of sequence s.
      kv_lengths: tokens of each sequence including the new ones.
      rope_lengths: the length each sequence's rotary frequencies are chosen for.
      block_tables: the pages of each sequence.
    """

    tokens: Int[Array | np.ndarray, " tokens"]
    query_starts: Int[Array | np.ndarray, " seqs_plus_one"]
    kv_lengths: Int[Array | np.ndarray, " seqs"]
    rope_lengths: Int[Array | np.ndarray, " seqs"]
    block_tables: Int[Array | np.ndarray, "seqs pages_per_seq"]


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepState:
    """Derived once per step, read by every layer.

    Attributes:
      valid: whether a row is a token and not padding.
      slot: where in the flattened pages a token's key and value go; past the end for padding.
      cos, sin: the rotary angles of each token.
    """

    valid: Bool[Array, " tokens"]
    slot: Int[Array, " tokens"]
    cos: Float[Array, "tokens half"]
    sin: Float[Array, "tokens half"]
    query_starts: Int[Array, " seqs_plus_one"]
    kv_lengths: Int[Array, " seqs"]
    block_tables: Int[Array, "seqs pages_per_seq"]


def prepare_step(step: StepInputs, config: ModelConfig, pages: int, page_size: int) -> StepState:
    """Finds each token's position, page slot and rotary angles."""
    row = jnp.arange(step.tokens.shape[0], dtype=jnp.int32)
    seqs = step.kv_lengths.shape[0]
    valid = row < step.query_starts[-1]
    seq = jnp.searchsorted(step.query_starts, row, side="right").astype(jnp.int32) - 1
    seq = jnp.clip(seq, 0, seqs - 1)
    first_position = step.kv_lengths - jnp.diff(step.query_starts)
    position = first_position[seq] + row - step.query_starts[seq]
    position = jnp.where(valid, position, 0)
    page = step.block_tables[seq, position // page_size]
    slot = jnp.where(valid, page * page_size + position % page_size, pages * page_size)
    cos, sin = rope_angles(config.rope, config.attention.head_dim, position, step.rope_lengths[seq])
    return StepState(
        valid=valid,
        slot=slot,
        cos=cos,
        sin=sin,
        query_starts=jnp.asarray(step.query_starts),
        kv_lengths=jnp.asarray(step.kv_lengths),
        block_tables=jnp.asarray(step.block_tables),
    )
