import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.training.products import multiply, multiply_transposed, project, transpose
from tests.tolerances import assert_close


def draw(*shape, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_accumulate_in_float32(batch, dtype):
    left, right = draw(*batch, 5, 7, dtype=dtype), draw(*batch, 7, 9, dtype=dtype, seed=1)
    expected = np.asarray(left, np.float32) @ np.asarray(right, np.float32)
    for product in (multiply(left, right), multiply_transposed(left, transpose(right))):
        assert product.dtype == jnp.float32
        assert_close(product, expected)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_projections_gradient_is_that_of_the_plain_product(batch):
    x, weight, dy = draw(*batch, 5, 7), draw(*batch, 9, 7, seed=1), draw(*batch, 5, 9, seed=2)
    plain = lambda x, weight: jnp.einsum("...ti,...oi->...to", x, weight)
    y, gradient = jax.vjp(project, x, weight)
    expected_y, expected_gradient = jax.vjp(plain, x, weight)
    assert_close(y, expected_y)
    for actual, expected in zip(gradient(dy), expected_gradient(dy), strict=True):
        assert_close(actual, expected)


def test_the_gradient_of_a_wide_weight_is_wide():
    x, weight = draw(5, 7, dtype=jnp.bfloat16), draw(9, 7)
    y, gradient = jax.vjp(project, x, weight)
    dx, dweight = gradient(jnp.ones_like(y))
    assert (y.dtype, dx.dtype, dweight.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
