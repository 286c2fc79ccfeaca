import jax
import jax.numpy as jnp

from moe_jax.training.expert_bank import run_experts
from tests.tolerances import assert_close


def plain(gate_up, down, x):
    gate, up = jnp.split(jnp.einsum("erd,efd->erf", x, gate_up), 2, axis=-1)
    return jnp.einsum("erf,edf->erd", jax.nn.silu(gate) * up, down)


def test_values_and_gradients_are_those_of_plain_experts():
    keys = jax.random.split(jax.random.key(0), 4)
    gate_up, down = jax.random.normal(keys[0], (3, 20, 8)), jax.random.normal(keys[1], (3, 8, 10))
    x, dy = jax.random.normal(keys[2], (3, 6, 8)), jax.random.normal(keys[3], (3, 6, 8))
    y, gradient = jax.vjp(run_experts, gate_up, down, x)
    expected, expected_gradient = jax.vjp(plain, gate_up, down, x)
    assert_close(y, expected)
    for actual, wanted in zip(gradient(dy), expected_gradient(dy), strict=True):
        assert_close(actual, wanted)
