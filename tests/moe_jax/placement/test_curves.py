import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.placement.curves import CostCurves, seconds


def test_linear_between_knots_constant_before_and_the_last_slope_after():
    knots, curve = jnp.array([2.0, 4.0, 8.0]), jnp.array([3.0, 3.0, 7.0])
    n = jnp.array([0, 1, 2, 3, 4, 5, 8, 10])
    np.testing.assert_array_equal(seconds(knots, curve, n), [3, 3, 3, 3, 3, 4, 7, 9])


def test_any_shape_of_counts():
    knots, curve = jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0])
    assert seconds(knots, curve, jnp.int32(5)).shape == ()
    assert seconds(knots, curve, jnp.ones((2, 3), jnp.int32)).shape == (2, 3)


def test_one_knot_is_a_constant():
    n = jnp.array([0, 1, 900])
    np.testing.assert_array_equal(seconds(jnp.array([1.0]), jnp.array([2.5]), n), [2.5] * 3)


@pytest.mark.parametrize(
    "curve, expected",
    [
        ([np.inf, np.inf, np.inf], [np.inf] * 5),
        ([1.0, 2.0, np.inf], [1, 2, np.inf, np.inf, np.inf]),
    ],
)
def test_infinite_knots(curve, expected):
    knots = jnp.array([1.0, 2.0, 4.0])
    result = seconds(knots, jnp.array(curve), jnp.array([1, 2, 3, 4, 9]))
    np.testing.assert_array_equal(result, expected)


def test_the_curves_are_a_pytree():
    scalar = jnp.float32(1)
    curves = CostCurves(
        tokens=jnp.array([1.0, 2.0]),
        host=jnp.array([1.0, 3.0]),
        device=jnp.array([1.0, 1.0]),
        stream=scalar,
        host_launch=scalar,
        link_latency=scalar,
        memory=scalar,
    )
    doubled = jax.jit(lambda c: jax.tree.map(lambda x: 2 * x, c))(curves)
    assert doubled.host_seconds(jnp.int32(4)) == 6
    assert doubled.device_seconds(jnp.int32(4)) == 2
