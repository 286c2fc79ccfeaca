"""The meaning of the grouped matrix product, stated as plainly as possible.

Knows nothing about speed: every row fetches a matrix of its own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul_reference(
    rows: Float[Array, "rows in"],
    weights: Float[Array, "groups out in"],
    group_sizes: Int[Array, " groups"],
    row_weights: Float[Array, " rows"] | None,
    *,
    gated: bool,
) -> Float[Array, "rows products"]:
    """Multiplies one row at a time; see `pallas_kernels.grouped_matmul` for the arguments."""
    ends = jnp.cumsum(group_sizes)

    def multiply(row: Int[Array, ""]) -> Array:
        # The first group that ends after this row; rows past the last group have none.
        group = jnp.sum(ends <= row)
        weight = weights.at[group].get(mode="fill", fill_value=0).astype(jnp.float32)
        product = jnp.matmul(weight, rows[row].astype(jnp.float32), precision="highest")
        if gated:
            gate, up = jnp.split(product, 2)
            product = jax.nn.silu(gate) * up
        if row_weights is not None:
            product = product * row_weights[row]
        # Row weights of rows that belong to no group may be anything, too.
        return jnp.where(group < ends.size, product, 0).astype(rows.dtype)

    return jax.lax.map(multiply, jnp.arange(rows.shape[0]))
