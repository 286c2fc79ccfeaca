"""RMS norm with its gradient written out.

Knows one array and its scale. Sums over the last axis are products with a column of ones, because
XLA:CPU does not vectorise them otherwise.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "rows features"], scale: Float[Array, " features"], epsilon: float
) -> Float[Array, "rows features"]:
    """As `moe_jax.model.ops.rms_norm`; the scale may have a wider dtype than x."""
    return _forward(x, scale, epsilon)[0]


def _sums(x: Array) -> Array:
    """Float32 sums over the last axis, kept as an axis of size 1."""
    ones = jnp.ones((x.shape[1], 2), x.dtype)
    return lax.dot_general(x, ones, (((1,), (0,)), ((), ())))[:, :1]


def _forward(x: Array, scale: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(_sums(wide * wide) / x.shape[1] + epsilon)
    y = (wide * inverse).astype(x.dtype) * scale.astype(x.dtype)[None]
    return y, (x, scale, inverse)


def _backward(epsilon: float, saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array]:
    x, scale, inverse = saved
    unit = x.astype(jnp.float32) * inverse
    dwide = dy.astype(jnp.float32)
    dscale = (dwide * unit).sum(axis=0)
    dunit = dwide * scale.astype(jnp.float32)[None]
    dx = inverse * (dunit - unit * (_sums(dunit * unit) / x.shape[1]))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_forward, _backward)
