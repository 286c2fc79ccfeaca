"""What training minimises: the tokens' nats, and a penalty on uneven use of experts."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def expert_shares(
    chosen: Int[Array, "tokens choices"], num_experts: int
) -> Float[Array, " experts"]:
    """The part of all choices that fell on each expert; sums to 1."""
    counts = jnp.bincount(chosen.reshape(-1), length=num_experts)
    return counts.astype(jnp.float32) / chosen.size


def balance_loss(
    probabilities: Float[Array, "tokens experts"], chosen: Int[Array, "tokens choices"]
) -> Float[Array, ""]:
    """The load-balancing loss of one layer: 1 when experts are used evenly, at most num_experts.

    Equations 4 to 6 of the Switch Transformer (arXiv:2101.03961), with shares taken over all
    choices of a token. Only the probabilities carry a gradient.
    """
    num_experts = probabilities.shape[-1]
    shares = expert_shares(chosen, num_experts)
    return num_experts * jnp.sum(shares * probabilities.mean(axis=0))
