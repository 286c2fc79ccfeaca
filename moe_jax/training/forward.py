"""The differentiable forward pass: whole sequences at once, every expert computed for every token.

Knows no cache, no pages and no placement. In float32 its logits equal the engine's.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key

from moe_jax.config import Activation, ModelConfig
from moe_jax.model.attention import project_output, project_qkv
from moe_jax.model.ops import activate, rms_norm
from moe_jax.model.rope import rope_angles
from moe_jax.model.router import route
from moe_jax.model.weights import LayerWeights, ModelWeights
from moe_jax.training.losses import balance_loss, expert_shares

AttentionKernel = Literal["plain", "cudnn"]


class Outputs(NamedTuple):
    """What a forward pass returns.

    Attributes:
      logits: float32.
      balance: the load-balancing loss of each layer of experts.
      shares: the part of all choices that fell on each expert, per layer of experts.
    """

    logits: Float[Array, "seqs positions vocab"]
    balance: Float[Array, " layers"]
    shares: Float[Array, "layers experts"]


def cast(weights: ModelWeights, dtype: jnp.dtype) -> ModelWeights:
    """The same weights in another dtype; differentiable."""
    graph, state = nnx.split(weights)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(dtype), state))


def forward(
    weights: ModelWeights,
    config: ModelConfig,
    tokens: Int[Array, "seqs positions"],
    *,
    dtype: jnp.dtype = jnp.float32,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
    kernel: AttentionKernel = "plain",
) -> Outputs:
    """Runs the model over whole sequences, each from position 0.

    Args:
      weights: made with `with_experts=True`, in any dtype.
      config: the model.
      tokens: token ids.
      dtype: what activations and products are computed in; norms, softmax, routing and logits are
        float32 always.
      dropout: the part of the embedding's and of each block's outputs that is set to zero.
      key: randomness for dropout.
      kernel: "plain" holds all scores in memory; "cudnn" does not, and needs a GPU and bfloat16.
    """
    if dropout and key is None:
        raise ValueError(f"dropout={dropout} needs a key")
    seqs, positions = tokens.shape
    # The table is read before it is cast: its gradient is a sum over many tokens.
    x = weights.embedding[...][tokens.reshape(-1)].astype(dtype)
    compute = cast(weights, dtype)
    place = jnp.tile(jnp.arange(positions, dtype=jnp.int32), seqs)
    length = jnp.full_like(place, positions)
    angles = rope_angles(config.rope, config.attention.head_dim, place, length)
    keys = iter([] if key is None else jax.random.split(key, 1 + 2 * config.layers))

    def drop(y: Float[Array, "tokens embed"]) -> Float[Array, "tokens embed"]:
        if not dropout:
            return y
        keep = jax.random.bernoulli(next(keys), 1 - dropout, y.shape)
        return jnp.where(keep, y / (1 - dropout), jnp.zeros_like(y))

    x = drop(x)
    balance, shares = [], []
    for layer, window in zip(compute.layers, config.windows, strict=True):
        normed = rms_norm(x, layer.attention_norm[...], config.norm_epsilon)
        x = x + drop(_attention(layer, config, normed, angles, seqs, window, kernel))
        normed = rms_norm(x, layer.ffn_norm[...], config.norm_epsilon)
        if layer.router is None:
            ffn = layer.ffn
            y = _gated(ffn.gate_up[...], ffn.down[...], normed, config.activation)
        else:
            y, layer_balance, layer_shares = _mixture(layer, config, normed)
            balance.append(layer_balance)
            shares.append(layer_shares)
        x = x + drop(y)
    x = rms_norm(x, compute.final_norm[...], config.norm_epsilon)
    table = compute.embedding if compute.unembedding is None else compute.unembedding
    logits = _product(x, table[...]).astype(jnp.float32)
    return Outputs(
        logits.reshape(seqs, positions, -1),
        jnp.stack(balance),
        jnp.stack(shares),
    )


def _product(
    x: Float[Array, "tokens in"], weight: Float[Array, "out in"]
) -> Float[Array, "tokens out"]:
    """x · weightᵀ in the dtype of x, so that the gradient's products are in that dtype too."""
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def _attention(
    layer: LayerWeights,
    config: ModelConfig,
    x: Float[Array, "tokens embed"],
    angles: tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]],
    seqs: int,
    window: int | None,
    kernel: AttentionKernel,
) -> Float[Array, "tokens embed"]:
    """Causal attention of every sequence over itself."""
    parts = project_qkv(layer.attention, x, *angles, config)
    query, key, value = (part.reshape(seqs, -1, *part.shape[1:]) for part in parts)
    if kernel == "plain":
        mixed = _plain_attention(query, key, value, window)
    else:
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=kernel,
        )
    return project_output(layer.attention, mixed.reshape(-1, *mixed.shape[2:]))


def _plain_attention(
    query: Float[Array, "seqs positions heads head_dim"],
    key: Float[Array, "seqs positions kv_heads head_dim"],
    value: Float[Array, "seqs positions kv_heads head_dim"],
    window: int | None,
) -> Float[Array, "seqs positions heads head_dim"]:
    """Softmax over every earlier position in the window, in float32."""
    seqs, positions, heads, head_dim = query.shape
    grouped = query.reshape(seqs, positions, key.shape[2], -1, head_dim)
    scores = jnp.einsum("sqkgd,spkd->skgqp", grouped, key).astype(jnp.float32)
    age = jnp.arange(positions)[:, None] - jnp.arange(positions)[None, :]
    seen = (age >= 0) & (age < (positions if window is None else window))
    scores = jnp.where(seen[None, None, None], scores * head_dim**-0.5, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("skgqp,spkd->sqkgd", probabilities, value)
    return mixed.reshape(seqs, positions, heads, head_dim)


def _gated(
    gate_up: Float[Array, "two_ffn embed"],
    down: Float[Array, "embed ffn"],
    x: Float[Array, "tokens embed"],
    activation: Activation,
) -> Float[Array, "tokens embed"]:
    gate, up = jnp.split(_product(x, gate_up), 2, axis=1)
    return _product(activate(activation)(gate) * up, down)


def _mixture(
    layer: LayerWeights, config: ModelConfig, x: Float[Array, "tokens embed"]
) -> tuple[Float[Array, "tokens embed"], Float[Array, ""], Float[Array, " experts"]]:
    """Every expert on every token, then the gates: two large products, no gathering.

    For a handful of small experts this wastes little and keeps a GPU busy. The gates scale the
    hidden values, so that the second product also sums over experts.
    """
    moe = config.moe
    gates, chosen, probabilities = route(layer.router[...], x, moe)
    gate_up, down = layer.experts.gate_up[...], layer.experts.down[...]
    flat = gate_up.reshape(-1, config.embed)
    hidden = _product(x, flat).reshape(-1, moe.num_experts, 2 * moe.ffn)
    gate, up = jnp.split(hidden, 2, axis=-1)
    chosen_by = jax.nn.one_hot(chosen, moe.num_experts, dtype=jnp.float32)
    weight = jnp.einsum("tc,tce->te", gates, chosen_by).astype(x.dtype)
    hidden = activate(config.activation)(gate) * up * weight[:, :, None]
    y = lax.dot_general(
        hidden.reshape(x.shape[0], -1),
        down.transpose(0, 2, 1).reshape(-1, config.embed),
        (((1,), (0,)), ((), ())),
    )
    if layer.shared is not None:
        shared = layer.shared.ffn
        common = _gated(shared.gate_up[...], shared.down[...], x, config.activation)
        y = y + jax.nn.sigmoid(_product(x, layer.shared.gate[...])) * common
    return y, balance_loss(probabilities, chosen), expert_shares(chosen, moe.num_experts)
