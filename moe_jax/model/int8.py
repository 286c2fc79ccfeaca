"""Experts in int8: a scale per row of a weight and per token, sums of products exact in int32.

Knows arrays only, not where they live. Half the bytes of bfloat16, at the price of rounding weights
and activations to 8 bits. The sums being exact, results do not depend on how a product is computed.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Int32

from moe_jax.config import Activation
from moe_jax.model.ops import (
    activate,
    most_summed,
    row_groups,
    runs_on_cpu,
    sum_products,
)


class Int8Expert(NamedTuple):
    """One expert's weights, whole numbers times the scale of their row."""

    gate_up: Int8[Array, "two_ffn embed"]
    gate_up_scale: Float[Array, " two_ffn"]
    down: Int8[Array, "embed ffn"]
    down_scale: Float[Array, " embed"]


def int8_bytes(shapes: tuple[tuple[int, int], tuple[int, int]]) -> int:
    """Bytes of an `Int8Expert` whose weights have these shapes."""
    return sum(math.prod(shape) + 4 * shape[0] for shape in shapes)


def quantize_rows(
    x: Float[Array, "rows features"],
) -> tuple[Int8[Array, "rows features"], Float[Array, " rows"]]:
    """The nearest whole numbers of -127 .. 127 times a float32 scale per row."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=1) / 127
    # A row of zeros has the scale 0; without the smallest normal number it would become NaN.
    unit = wide / jnp.maximum(scale, 1.2e-38)[:, None]
    return jnp.round(unit).astype(jnp.int8), scale


def multiply_int8(
    weight: Int8[Array, "out in"], x: Int8[Array, "tokens in"]
) -> Int32[Array, "tokens out"]:
    """Returns x · weightᵀ, exactly. No sum may exceed int32: at most 133,000 inputs."""
    if x.shape[0] <= most_summed() and runs_on_cpu(weight):
        return sum_products(weight, x.T, jnp.int32, row_groups(weight, x.shape[0])).T
    dot = functools.partial(
        lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    )
    # On XLA:CPU the weight is laid out anew, which pays from here on, most of all with jax 0.12.
    if not runs_on_cpu(weight) or x.shape[0] >= 64:
        return dot(x, weight)
    return lax.optimization_barrier(dot(weight, x)).T


def gated_ffn_int8(
    expert: Int8Expert, x: Float[Array, "tokens embed"], activation: Activation
) -> Float[Array, "tokens embed"]:
    """`ops.gated_ffn` with 8-bit weights, activations and hidden values; float32."""
    gate_up = _multiply(expert.gate_up, expert.gate_up_scale, x)
    gate, up = jnp.split(gate_up, 2, axis=1)
    return _multiply(expert.down, expert.down_scale, activate(activation)(gate) * up)


def _multiply(weight: jax.Array, weight_scale: jax.Array, x: jax.Array) -> jax.Array:
    whole, scale = quantize_rows(x)
    # XLA:CPU would round again for every few rows of the weight, inside the loop over its inputs;
    # with the options for a GPU, jax 0.10 still does.
    whole = lax.optimization_barrier(whole)
    product = multiply_int8(weight, whole).astype(jnp.float32)
    return product * scale[:, None] * weight_scale[None, :]
