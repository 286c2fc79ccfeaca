"""The small operations every layer is made of: products with [out, in] weights, norms, activations.

Knows arrays only, not where they live.
"""

from collections.abc import Callable
from typing import assert_never

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moe_jax.config import Activation


def multiply_columns(
    weight: Float[Array, "out in"], columns: Float[Array, "in tokens"]
) -> Float[Array, "out tokens"]:
    """Returns weight · columns, accumulated and returned in float32.

    The weight comes first and the tokens are columns because XLA:CPU then reads a bfloat16 weight
    at memory speed; with a single column it would convert the whole weight to float32 instead, so
    a second column of zeros is added there.
    """
    tokens = columns.shape[1]
    if tokens == 1 and jax.default_backend() == "cpu":
        columns = jnp.pad(columns, ((0, 0), (0, 1)))
    product = lax.dot_general(
        weight, columns, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return product[:, :tokens]


def linear(
    weight: Float[Array, "out in"],
    x: Float[Array, "tokens in"],
    bias: Float[Array, " out"] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "tokens out"]:
    """Returns x · weightᵀ + bias, accumulated in float32, in `dtype` (None: the dtype of x)."""
    if jax.default_backend() == "cpu" and x.shape[0] < 64:
        # XLA:CPU would fold the transpose into the product and then refuse its element types.
        y = lax.optimization_barrier(multiply_columns(weight, x.T)).T
    else:
        y = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None]
    return y.astype(dtype or x.dtype)


def rms_norm(
    x: Float[Array, "*rows features"], scale: Float[Array, " features"], epsilon: float
) -> Float[Array, "*rows features"]:
    """Divides by the root mean square over the last axis, in float32, then scales in x's dtype."""
    wide = x.astype(jnp.float32)
    power = jnp.mean(wide * wide, axis=-1, keepdims=True)
    unit = (wide * lax.rsqrt(power + epsilon)).astype(x.dtype)
    return unit * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def activate(name: Activation) -> Callable[[Array], Array]:
    """Returns the activation function of that name."""
    match name:
        case "silu":
            return jax.nn.silu
        case "gelu":
            return lambda x: jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return lambda x: jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu
        case _:
            assert_never(name)


def gated_ffn(
    gate_up: Float[Array, "two_ffn embed"],
    down: Float[Array, "embed ffn"],
    x: Float[Array, "tokens embed"],
    activation: Activation,
) -> Float[Array, "tokens embed"]:
    """Returns down · (activation(gate · x) * (up · x)) per token, in the dtype of x."""
    gate, up = jnp.split(multiply_columns(gate_up, x.T), 2, axis=0)
    hidden = (activate(activation)(gate) * up).astype(x.dtype)
    # The barrier keeps the transpose out of the product: XLA:CPU refuses the folded form.
    return lax.optimization_barrier(multiply_columns(down, hidden)).T.astype(x.dtype)
