"""Matrix products whose gradients are as fast as they are.

Knows no model. XLA:CPU multiplies bfloat16 at full speed only if both operands lie row by row and
the left one is not transposed; anything else it converts to float32 and multiplies several times
slower. Its own gradient of a product is such a case, so the gradients are written out here, with
the transposed operand laid out anew first (which is cheap). On other backends this costs nothing.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


def multiply(
    left: Float[Array, "*batch rows inner"], right: Float[Array, "*batch inner columns"]
) -> Float[Array, "*batch rows columns"]:
    """left · right for every batch, accumulated and returned in float32. Not for `jax.grad`."""
    return _dot(left, right, left.ndim - 2)


def multiply_transposed(
    left: Float[Array, "*batch rows inner"], right: Float[Array, "*batch columns inner"]
) -> Float[Array, "*batch rows columns"]:
    """left · rightᵀ for every batch, accumulated and returned in float32. Not for `jax.grad`."""
    return _dot(left, right, left.ndim - 1)


def transpose(x: Float[Array, "*batch rows columns"]) -> Float[Array, "*batch columns rows"]:
    """Exchanges the last two axes in memory, not only in name."""
    # Without the barriers the transpose would be folded into the product before or after it.
    return lax.optimization_barrier(
        _row_by_row(jnp.swapaxes(lax.optimization_barrier(_row_by_row(x)), -1, -2))
    )


@jax.custom_vjp
def project(
    x: Float[Array, "*batch tokens in"], weight: Float[Array, "*batch out in"]
) -> Float[Array, "*batch tokens out"]:
    """x · weightᵀ in the dtype of x; the weight, and its gradient, may have a wider one."""
    return multiply_transposed(x, weight.astype(x.dtype)).astype(x.dtype)


def _project_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return project(x, weight), (x, weight)


def _project_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, weight = saved
    dx = multiply(dy, weight.astype(x.dtype)).astype(x.dtype)
    return dx, multiply(transpose(dy), x).astype(weight.dtype)


project.defvjp(_project_forward, _project_backward)


def _row_by_row(x: Array) -> Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _dot(left: Array, right: Array, inner: int) -> Array:
    batch = tuple(range(left.ndim - 2))
    return lax.dot_general(
        _row_by_row(left),
        _row_by_row(right),
        (((left.ndim - 1,), (inner,)), (batch, batch)),
        preferred_element_type=jnp.float32,
    )
