"""All experts of a layer, each on its own rows, with the gradient written out.

Knows no routing. Hidden values are [ffn, rows]: every product is then of the kind that
`moe_jax.training.products` calls fast, and only inputs and outputs are transposed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.training.products import multiply, multiply_transposed, transpose


@jax.custom_vjp
def run_experts(
    gate_up: Float[Array, "experts two_ffn embed"],
    down: Float[Array, "experts embed ffn"],
    x: Float[Array, "experts rows embed"],
) -> Float[Array, "experts rows embed"]:
    """down · (silu(gate · x) * (up · x)) for the rows of each expert, in the dtype of x."""
    return _forward(gate_up, down, x)[0]


def _forward(gate_up: Array, down: Array, x: Array) -> tuple[Array, tuple[Array, ...]]:
    hidden = multiply_transposed(gate_up.astype(x.dtype), x).astype(x.dtype)
    gate, up = jnp.split(hidden.astype(jnp.float32), 2, axis=1)
    active = (jax.nn.silu(gate) * up).astype(x.dtype)
    y = transpose(multiply(down.astype(x.dtype), active).astype(x.dtype))
    return y, (gate_up, down, x, hidden, active)


def _backward(saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    gate_up, down, x, hidden, active = saved
    ddown = transpose(multiply(active, dy))
    dactive = multiply_transposed(transpose(down.astype(x.dtype)), dy)
    gate, up = jnp.split(hidden.astype(jnp.float32), 2, axis=1)
    sigmoid = jax.nn.sigmoid(gate)
    dgate = dactive * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dactive * gate * sigmoid
    dhidden = jnp.concatenate([dgate.astype(x.dtype), dup.astype(x.dtype)], axis=1)
    dgate_up = multiply(dhidden, x)
    dx = transpose(multiply(transpose(gate_up.astype(x.dtype)), dhidden).astype(x.dtype))
    return dgate_up.astype(gate_up.dtype), ddown.astype(down.dtype), dx


run_experts.defvjp(_forward, _backward)
