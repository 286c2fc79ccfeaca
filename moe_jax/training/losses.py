"""What training minimises: the tokens' nats, and a penalty on uneven use of experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.training.products import multiply, multiply_transposed, transpose

_CHUNK = 2048


def expert_shares(
    chosen: Int[Array, "tokens choices"], num_experts: int
) -> Float[Array, " experts"]:
    """The part of all choices that fell on each expert; sums to 1."""
    is_chosen = chosen.reshape(-1)[:, None] == jnp.arange(num_experts)[None, :]
    return is_chosen.astype(jnp.float32).mean(axis=0)


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


@jax.custom_vjp
def mean_nats(
    x: Float[Array, "tokens embed"],
    table: Float[Array, "vocab embed"],
    targets: Int[Array, " tokens"],
    importance: Float[Array, " tokens"],
) -> tuple[Float[Array, ""], Float[Array, " tokens"]]:
    """Minus the log probability of each target under the logits x · tableᵀ.

    Logits and their gradient exist for a few tokens at a time only, and are made once: the forward
    pass computes the gradients too.

    Returns:
      The mean, weighted by importance, and the nats of every token; these carry no gradient.
    """
    return _mean_nats_forward(x, table, targets, importance)[0]


def _mean_nats_forward(
    x: Array, table: Array, targets: Array, importance: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    narrow = table.astype(x.dtype)
    turned = transpose(narrow)
    share = importance / importance.sum()
    nats, dtable, dx = [], jnp.zeros(table.shape, jnp.float32), []
    for start in range(0, x.shape[0], _CHUNK):
        here = slice(start, start + _CHUNK)
        part, target = x[here], targets[here]
        # [vocab, tokens]: sums over the first of two axes are vectorised, over the last not.
        logits = multiply_transposed(narrow, part)
        top = logits.max(axis=0, keepdims=True)
        weights = jnp.exp(logits - top)
        sums = weights.sum(axis=0, keepdims=True)
        is_target = target[None, :] == jnp.arange(table.shape[0])[:, None]
        at_target = jnp.where(is_target, logits, 0).sum(axis=0)
        nats.append(jnp.log(sums[0]) + top[0] - at_target)
        # As large as the tokens are many until the end, so that bfloat16 keeps small ones.
        scale = share[here] * x.shape[0]
        dlogits = (weights / sums - is_target.astype(jnp.float32)) * scale[None, :]
        dlogits = dlogits.astype(x.dtype)
        dx.append(transpose(multiply(turned, dlogits)))
        dtable = dtable + multiply(dlogits, part)
    every = jnp.concatenate(nats)
    dx = (jnp.concatenate(dx) / x.shape[0]).astype(x.dtype)
    dtable = (dtable / x.shape[0]).astype(table.dtype)
    return ((every * share).sum(), every), (dx, dtable)


def _mean_nats_backward(
    saved: tuple[Array, Array], scales: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    (dx, dtable), (scale, _) = saved, scales
    return dx * scale.astype(dx.dtype), dtable * scale.astype(dtable.dtype), None, None


mean_nats.defvjp(_mean_nats_forward, _mean_nats_backward)
