"""Floating-point arrays as whole numbers of the same bits, to be moved about.

XLA:CPU of jax 0.10 slices, pads, updates and gathers bfloat16 by converting all of it to float32.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt


def bits_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the unsigned integer dtype that can hold the bits of a dtype."""
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")


def as_bits(x: Float[Array, "*shape"]) -> UInt[Array, "*shape"]:
    """The same bits as whole numbers."""
    return lax.bitcast_convert_type(x, bits_dtype(x.dtype))


def from_bits(bits: UInt[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """Undoes `as_bits`."""
    return lax.bitcast_convert_type(bits, dtype)
