"""The small operations every layer is made of: products with [out, in] weights, norms, activations.

Knows arrays only, not where they live.
"""

import math
import operator
from collections.abc import Callable
from typing import assert_never

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from host_offload.processor import has_matrix_units, has_wide_vectors
from moe_jax.config import Activation


def multiply_columns(
    weight: Float[Array, "out in"],
    columns: Float[Array, "in tokens"],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "out tokens"]:
    """Returns weight · columns, accumulated in float32, in `dtype`.

    The weight comes first because XLA:CPU then reads a bfloat16 weight without a copy in float32.
    For the few columns of a decode step there is a faster form.
    """
    if _are_few(columns.shape[1], weight):
        groups = row_groups(weight, columns.shape[1])
        return sum_products(weight, columns, jnp.float32, groups).astype(dtype)
    return _dot(weight, columns, 0, dtype)


def multiply_rows(
    weight: Float[Array, "out in"],
    rows: Float[Array, "tokens in"],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "out tokens"]:
    """Returns weight · rowsᵀ: `multiply_columns` of one token per row."""
    if _are_few(rows.shape[0], weight):
        return multiply_columns(weight, rows.T, dtype)
    # Not as a product with rows.T: XLA:CPU would convert the weight to float32.
    return _dot(weight, rows, 1, dtype)


def _are_few(tokens: int, weight: Array) -> bool:
    return tokens <= most_summed() and weight.dtype == jnp.bfloat16 and runs_on_cpu(weight)


def _dot(left: Array, right: Array, axis: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Array:
    """Sums over the last axis of left and this axis of right, in float32; returned in `dtype`."""
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=dtype)


def runs_on_cpu(weight: Array) -> bool:
    """Whether XLA:CPU compiles a product: on that backend, and in host computations on any."""
    in_host_memory = jax.typeof(weight).memory_space == jax.memory.Space.Host
    return in_host_memory or jax.default_backend() == "cpu"


# Up to so many tokens a step is a decode step of a few sequences.
FEW_TOKENS = 6


def most_summed() -> int:
    """Up to how many tokens XLA:CPU multiplies fastest as `sum_products` and not as a dot.

    Matrix units take a dot of two columns at the speed at which its weight is read.
    """
    return 1 if has_matrix_units() else FEW_TOKENS


def row_groups(weight: Shaped[Array, "out in"], columns: int) -> int:
    """How many rows of a weight of 8 or 16 bits `sum_products` reads side by side.

    As measured: eight on processors with matrix units, else four, but two where vectors are wide
    and columns few, unless rows of 16 bits are long. The columns of long rows leave the nearest
    cache and are read once per group.
    """
    if has_matrix_units():
        return 8
    short = weight.dtype.itemsize == 1 or weight.shape[1] <= 2048
    return 2 if short and columns <= 2 and has_wide_vectors() else 4


def sum_products(
    weight: Shaped[Array, "out in"],
    columns: Shaped[Array, "in tokens"],
    dtype: jax.typing.DTypeLike,
    groups: int,
) -> Shaped[Array, "out tokens"]:
    """Multiplies a matrix of 8 or 16 bits with one to six vectors on XLA:CPU, near memory speed.

    As a dot, one column would cost a wider copy of the weight and a few as much as sixteen. One
    reduction with several results becomes a single loop over the inputs that keeps the sums of
    `groups` rows, of this dtype, in registers; it is vectorised where
    `host_compute.compiler_options` allow sums to be reordered. With a single result XLA:CPU would
    compile the reduction in another way. The loop is faster where each column lies in one piece, as
    do those of a transposed array and of what this function returns.
    """
    rows, count = weight.shape[0], columns.shape[1]
    groups = math.gcd(rows, groups)
    if groups * count == 1:
        two = jnp.pad(columns, ((0, 0), (0, 1)))
        return sum_products(weight, two, dtype, groups)[:, :1]
    wide = columns.astype(dtype)
    products = [
        group.astype(dtype) * wide[None, :, column]
        for column in range(count)
        for group in jnp.split(weight, groups)
    ]
    zero = jax.device_put(jnp.zeros((), dtype), jax.typeof(weight).memory_space)
    sums = lax.reduce(
        products, [zero] * len(products), lambda *pair: jax.tree.map(operator.add, *pair), (1,)
    )
    return jnp.stack(sums).reshape(count, rows).T


def linear(
    weight: Float[Array, "out in"],
    x: Float[Array, "tokens in"],
    bias: Float[Array, " out"] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    rounded: bool = False,
) -> Float[Array, "tokens out"]:
    """Returns x · weightᵀ + bias, accumulated in float32, in `dtype` (None: the dtype of x).

    With `rounded`, the product has the dtype of x (see `host_offload.rounded_products`).
    """
    if runs_on_cpu(weight) and x.shape[0] <= FEW_TOKENS:
        # XLA:CPU would fold the outer transpose into the product and refuse its element types.
        y = lax.optimization_barrier(multiply_rows(weight, x)).T
    else:
        y = _dot(x, weight, 1, x.dtype if rounded else jnp.float32)
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


def tokens_come_first(weight: Float[Array, "out in"], tokens: int) -> bool:
    """Whether x · weightᵀ is faster than weight · xᵀ for this many tokens, beyond a decode step.

    XLA:CPU lays the right operand out anew. That pays for a weight from a hundred tokens on, if the
    processor's matrix units are fast enough to wait for memory otherwise.
    """
    return not runs_on_cpu(weight) or (has_matrix_units() and tokens >= 128)


def gated_ffn(
    gate_up: Float[Array, "two_ffn embed"],
    down: Float[Array, "embed ffn"],
    x: Float[Array, "tokens embed"],
    activation: Activation,
    rounded: bool = False,
) -> Float[Array, "tokens embed"]:
    """Returns down · (activation(gate · x) * (up · x)) per token, in float32.

    The hidden values have the dtype of x; with `rounded`, so has every product (see
    `host_offload.rounded_products`), as in Transformers.
    """

    def hidden(gate: Array, up: Array) -> Array:
        wide = activate(activation)(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return wide.astype(x.dtype)

    dtype = x.dtype if rounded else jnp.float32
    if not rounded and tokens_come_first(gate_up, x.shape[0]):
        gate, up = jnp.split(linear(gate_up, x, dtype=jnp.float32), 2, axis=1)
        return linear(down, hidden(gate, up), dtype=jnp.float32)
    gate, up = jnp.split(multiply_rows(gate_up, x, dtype), 2, axis=0)
    # As in `linear`: the transpose must not be folded into the product.
    y = lax.optimization_barrier(multiply_columns(down, hidden(gate, up), dtype))
    return y.T.astype(jnp.float32)
