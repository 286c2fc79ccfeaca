import jax

from moe_jax.model import ops
from moe_jax.training.norm import rms_norm
from tests.tolerances import assert_close


def test_values_and_gradients_are_those_of_the_norm_that_serves():
    keys = jax.random.split(jax.random.key(0), 3)
    x, scale = jax.random.normal(keys[0], (7, 24)), jax.random.normal(keys[1], (24,))
    y, gradient = jax.vjp(lambda x, scale: rms_norm(x, scale, 1e-2), x, scale)
    expected, expected_gradient = jax.vjp(lambda x, scale: ops.rms_norm(x, scale, 1e-2), x, scale)
    assert_close(y, expected)
    dy = jax.random.normal(keys[2], y.shape)
    for actual, wanted in zip(gradient(dy), expected_gradient(dy), strict=True):
        assert_close(actual, wanted)
