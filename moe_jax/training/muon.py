"""The Muon optimiser: momentum, made orthogonal, for matrices.

Knows no model. Algorithm: https://kellerjordan.github.io/posts/muon. Written here rather than
taken from optax because its products must be of the kind in `moe_jax.training.products`, and
because fused matrices (query, key and value; gate and up) are taken apart first.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.training.products import multiply, multiply_transposed, transpose


def orthogonalise(
    matrices: Float[Array, "batch rows columns"], steps: int = 5
) -> Float[Array, "batch rows columns"]:
    """Moves all singular values close to 1, by Newton-Schulz iteration in bfloat16."""
    rows, columns = matrices.shape[1:]
    norm = jnp.sqrt((matrices * matrices).sum(axis=(1, 2), keepdims=True))
    x = (matrices / (norm + 1e-7)).astype(jnp.bfloat16)
    if rows > columns:
        x = transpose(x)
    for _ in range(steps):
        square = multiply_transposed(x, x)
        narrow = square.astype(jnp.bfloat16)
        # square is symmetric, so its transpose does as well.
        polynomial = -4.7750 * square + 2.0315 * multiply_transposed(narrow, narrow)
        x = 3.4445 * x.astype(jnp.float32) + multiply(polynomial.astype(jnp.bfloat16), x)
        x = x.astype(jnp.bfloat16)
    if rows > columns:
        x = transpose(x)
    return x.astype(jnp.float32)


def muon_update(
    direction: Float[Array, "*batch rows columns"], parts: tuple[int, ...]
) -> Float[Array, "*batch rows columns"]:
    """The orthogonal matrices nearest to a direction, scaled as in Muon.

    Args:
      direction: what the momentum says, [rows, columns] or a bank of such.
      parts: rows of the matrices that are stacked in the direction; they sum to `rows`.
    """
    bank = direction.reshape(-1, *direction.shape[-2:])
    columns = bank.shape[-1]
    if len(set(parts)) == 1:
        whole = orthogonalise(bank.reshape(-1, parts[0], columns))
        return whole.reshape(direction.shape) * max(1.0, parts[0] / columns) ** 0.5
    starts = [sum(parts[:index]) for index in range(len(parts))]
    pieces = [
        orthogonalise(bank[:, start : start + rows]) * max(1.0, rows / columns) ** 0.5
        for start, rows in zip(starts, parts, strict=True)
    ]
    return jnp.concatenate(pieces, axis=1).reshape(direction.shape)
