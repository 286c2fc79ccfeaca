"""A layer of experts in training: every expert on every token, or each on the tokens that chose it.

Knows one layer's weights; the router is the one that serves.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.model.router import route
from moe_jax.model.weights import ExpertBankWeights, LayerWeights
from moe_jax.training.expert_bank import run_experts
from moe_jax.training.losses import balance_loss, expert_shares


class Mixed(NamedTuple):
    """What a layer of experts returns.

    Attributes:
      output: the weighted sum of each token's experts.
      balance: the load-balancing loss.
      shares: the part of all choices that fell on each expert.
      probabilities: of the router, over all experts.
    """

    output: Float[Array, "tokens embed"]
    balance: Float[Array, ""]
    shares: Float[Array, " experts"]
    probabilities: Float[Array, "tokens experts"]


def mixture(
    layer: LayerWeights,
    config: ModelConfig,
    x: Float[Array, "tokens embed"],
    capacity: float | None,
) -> Mixed:
    """Runs one layer of experts.

    Args:
      capacity: room for tokens in each expert, as a multiple of the fair share. What does not fit
        is left out, as in the Switch Transformer (arXiv:2101.03961). None: every expert is
        computed for every token, and the result is exact.
    """
    moe = config.moe
    assert layer.router is not None and layer.experts is not None, "a layer without experts"
    gates, chosen, probabilities = route(
        layer.router[...].astype(jnp.float32), x.astype(jnp.float32), moe
    )
    if capacity is None:
        y = _everywhere(layer.experts, config, x, gates, chosen)
    else:
        room = int(capacity * chosen.size / moe.num_experts)
        room = min(x.shape[0], -(-room // 16) * 16)
        y = _dispatched(layer.experts, config, x, gates, chosen, room)
    shares = expert_shares(chosen, moe.num_experts)
    return Mixed(y, balance_loss(probabilities, chosen), shares, probabilities)


def _everywhere(
    bank: ExpertBankWeights,
    config: ModelConfig,
    x: Float[Array, "tokens embed"],
    gates: Float[Array, "tokens choices"],
    chosen: Int[Array, "tokens choices"],
) -> Float[Array, "tokens embed"]:
    experts = config.moe.num_experts
    is_chosen = chosen[:, :, None] == jnp.arange(experts)[None, None, :]
    weight = jnp.where(is_chosen, gates[:, :, None], 0).sum(axis=1)
    y = run_experts(
        bank.gate_up[...],
        bank.down[...],
        jnp.broadcast_to(x[None], (experts, *x.shape)),
    )
    return (y.astype(jnp.float32) * weight.T[:, :, None]).sum(axis=0).astype(x.dtype)


def _dispatched(
    bank: ExpertBankWeights,
    config: ModelConfig,
    x: Float[Array, "tokens embed"],
    gates: Float[Array, "tokens choices"],
    chosen: Int[Array, "tokens choices"],
    room: int,
) -> Float[Array, "tokens embed"]:
    pairs, experts = chosen.size, config.moe.num_experts
    # One sort by (expert, pair) puts each expert's pairs side by side, first tokens first.
    order = jnp.sort(chosen.reshape(-1) * pairs + jnp.arange(pairs, dtype=jnp.int32)) % pairs
    counts = (chosen.reshape(-1)[:, None] == jnp.arange(experts)[None, :]).sum(axis=0)
    starts = jnp.cumsum(counts) - counts
    place = starts[:, None] + jnp.arange(room)[None, :]
    pair = order[jnp.minimum(place, pairs - 1)]
    used = jnp.arange(room)[None, :] < counts[:, None]
    token = pair // chosen.shape[1]
    weight = jnp.where(used, gates.reshape(-1)[pair], 0)
    y = run_experts(bank.gate_up[...], bank.down[...], x[token])
    y = y.astype(jnp.float32) * weight[:, :, None]
    total = jnp.zeros(x.shape, jnp.float32).at[token.reshape(-1)].add(y.reshape(-1, x.shape[1]))
    return total.astype(x.dtype)
