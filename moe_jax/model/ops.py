"""The small operations every layer is made of: products with [out, in] weights, norms, activations.

Knows arrays only, not where they live.
"""

import functools
import operator
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
    at memory speed from two columns on. A single column has a form of its own there.
    """
    if columns.shape[1] == 1 and weight.dtype == jnp.bfloat16 and _runs_on_cpu(weight):
        return _multiply_one_column(weight, columns)
    return lax.dot_general(
        weight, columns, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def _runs_on_cpu(weight: Array) -> bool:
    """Whether XLA:CPU compiles the product: on that backend, and in host computations on any."""
    in_host_memory = jax.typeof(weight).memory_space == jax.memory.Space.Host
    return in_host_memory or jax.default_backend() == "cpu"


# XLA:CPU fuses a sum of at most this many products of slices without converting the weight first.
_MOST_TERMS = 14


def _multiply_one_column(
    weight: Float[Array, "out in"], column: Float[Array, "in 1"]
) -> Float[Array, "out 1"]:
    """Multiplies a bfloat16 matrix with one vector on XLA:CPU.

    As a dot it would become a float32 copy of the weight, or with a column of padding a kernel
    made for sixteen columns. A sum over slices becomes one vectorised loop that reads the weight
    as it is: `lanes` partial sums per row, folded by a second, small product.
    """
    inputs = weight.shape[1]
    lanes = 32
    while lanes * _MOST_TERMS < inputs:
        lanes *= 2
    if inputs % lanes:
        padded = jnp.pad(column, ((0, 0), (0, 1)))
        return multiply_columns(weight, padded)[:, :1]
    vector = column[:, 0].astype(jnp.float32)
    parts = [slice(first, first + lanes) for first in range(0, inputs, lanes)]
    partial = functools.reduce(
        operator.add, (weight[:, p].astype(jnp.float32) * vector[None, p] for p in parts)
    )
    ones = jnp.ones((lanes, 1), jnp.float32)
    return jnp.dot(partial, jax.device_put(ones, jax.typeof(weight).memory_space))


def linear(
    weight: Float[Array, "out in"],
    x: Float[Array, "tokens in"],
    bias: Float[Array, " out"] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "tokens out"]:
    """Returns x · weightᵀ + bias, accumulated in float32, in `dtype` (None: the dtype of x)."""
    if _runs_on_cpu(weight) and x.shape[0] < 64:
        # XLA:CPU would fold the outer transpose into the product and refuse its element types.
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
    columns: Float[Array, "embed tokens"],
    activation: Activation,
) -> Float[Array, "embed tokens"]:
    """Returns down · (activation(gate · x) * (up · x)) per column, in float32.

    The hidden values have the dtype of the columns.
    """
    gate, up = jnp.split(multiply_columns(gate_up, columns), 2, axis=0)
    hidden = (activate(activation)(gate) * up).astype(columns.dtype)
    return multiply_columns(down, hidden)


def gated_ffn_rows(
    gate_up: Float[Array, "two_ffn embed"],
    down: Float[Array, "embed ffn"],
    x: Float[Array, "tokens embed"],
    activation: Activation,
) -> Float[Array, "tokens embed"]:
    """`gated_ffn` for one token per row, in the dtype of x."""
    gate, up = jnp.split(linear(gate_up, x, dtype=jnp.float32), 2, axis=1)
    hidden = (activate(activation)(gate) * up).astype(x.dtype)
    return linear(down, hidden)
