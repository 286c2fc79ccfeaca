"""The differentiable forward pass: whole sequences at once.

Knows no cache, no pages and no placement. In float32 its logits equal the engine's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.model.rope import rope_angles, rotate
from moe_jax.model.weights import AttentionWeights, ModelWeights
from moe_jax.training.attention import causal_attention
from moe_jax.training.mixture import mixture
from moe_jax.training.norm import rms_norm
from moe_jax.training.products import multiply_transposed, project

# (query, key, value) [seqs, positions, heads or kv_heads, head_dim] -> as query.
Attend = Callable[[Array, Array, Array], Array]


class Hidden(NamedTuple):
    """What the layers return.

    Attributes:
      states: after the last norm, in the dtype of the products.
      balance: the load-balancing loss of each layer.
      shares: the part of all choices that fell on each expert, per layer.
      probabilities: of each layer's router.
    """

    states: Float[Array, "tokens embed"]
    balance: Float[Array, " layers"]
    shares: Float[Array, "layers experts"]
    probabilities: Float[Array, "layers tokens experts"]


class Outputs(NamedTuple):
    """Logits in float32, and the probabilities of each layer's router."""

    logits: Float[Array, "seqs positions vocab"]
    probabilities: Float[Array, "layers seqs positions experts"]


def check_trainable(config: ModelConfig) -> None:
    """Raises ValueError unless the model is the plain kind of qwen3_moe that is trained here."""
    a = config.attention
    plain = (
        config.family == "qwen3_moe"
        and a.qk_norm == "head"
        and not (a.qkv_bias or a.output_bias)
        and a.clip_qkv is None
        and config.moe.shared_ffn is None
        and config.rope.kind == "default"
        and all(config.moe_layers)
        and not any(config.windows)
        and config.activation == "silu"
    )
    if not plain:
        raise ValueError(
            "only a qwen3_moe model with experts in every layer, plain rope and no sliding window "
            f"can be trained, got {config}"
        )


def hidden_states(
    weights: ModelWeights,
    config: ModelConfig,
    tokens: Int[Array, "seqs positions"],
    *,
    dtype: DTypeLike = jnp.float32,
    capacity: float | None = None,
    attend: Attend = causal_attention,
) -> Hidden:
    """Runs all layers over whole sequences, each from position 0.

    Args:
      weights: made with `with_experts=True`, in any dtype.
      config: the model.
      tokens: token ids.
      dtype: of activations and products; norms, softmax and routing are float32.
      capacity: see `moe_jax.training.mixture`; None is exact.
      attend: mixes the values of each position's predecessors.

    Raises:
      ValueError: the model is of a kind that is not trained here.
    """
    check_trainable(config)
    seqs, positions = tokens.shape
    place = jnp.tile(jnp.arange(positions, dtype=jnp.int32), seqs)
    angles = rope_angles(
        config.rope, config.attention.head_dim, place, jnp.full_like(place, positions)
    )
    x = weights.embedding[...][tokens.reshape(-1)].astype(dtype)
    layers = []
    for layer in weights.layers:
        normed = rms_norm(x, layer.attention_norm[...], config.norm_epsilon)
        x = x + _attend(layer.attention, config, normed, angles, seqs, attend)
        normed = rms_norm(x, layer.ffn_norm[...], config.norm_epsilon)
        mixed = mixture(layer, config, normed, capacity)
        x = x + mixed.output
        layers.append(mixed[1:])
    x = rms_norm(x, weights.final_norm[...], config.norm_epsilon)
    return Hidden(x, *(jnp.stack(each) for each in zip(*layers, strict=True)))


def output_table(weights: ModelWeights) -> Float[Array, "vocab embed"]:
    """The matrix that turns states into logits."""
    table = weights.embedding if weights.unembedding is None else weights.unembedding
    return table[...]


def forward(
    weights: ModelWeights,
    config: ModelConfig,
    tokens: Int[Array, "seqs positions"],
    *,
    dtype: DTypeLike = jnp.float32,
    capacity: float | None = None,
    attend: Attend = causal_attention,
) -> Outputs:
    """The logits of every position; arguments and errors as in `hidden_states`."""
    hidden = hidden_states(weights, config, tokens, dtype=dtype, capacity=capacity, attend=attend)
    logits = multiply_transposed(hidden.states, output_table(weights).astype(dtype))
    probabilities = hidden.probabilities.reshape(config.layers, *tokens.shape, -1)
    return Outputs(logits.reshape(*tokens.shape, -1), probabilities)


def _attend(
    attention: AttentionWeights,
    config: ModelConfig,
    x: Float[Array, "tokens embed"],
    angles: tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]],
    seqs: int,
    attend: Attend,
) -> Float[Array, "tokens embed"]:
    a = config.attention
    parts = project(x, attention.qkv[...]).reshape(x.shape[0], -1, a.head_dim)
    query, key, value = jnp.split(parts, [a.heads, a.heads + a.kv_heads], axis=1)
    assert attention.query_norm is not None and attention.key_norm is not None, "no q/k norm"
    query = _norm_heads(query, attention.query_norm[...], config.norm_epsilon)
    key = _norm_heads(key, attention.key_norm[...], config.norm_epsilon)
    query, key, value = (
        part.reshape(seqs, -1, *part.shape[1:])
        for part in (rotate(query, *angles), rotate(key, *angles), value)
    )
    mixed = attend(query, key, value)
    return project(mixed.reshape(x.shape[0], -1), attention.output[...])


def _norm_heads(
    x: Float[Array, "tokens heads head_dim"], scale: Float[Array, " head_dim"], epsilon: float
) -> Float[Array, "tokens heads head_dim"]:
    return rms_norm(x.reshape(-1, scale.size), scale, epsilon).reshape(x.shape)
