"""Products with [out, in] weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from host_offload.host_compute import compiler_options
from moe_jax.model.ops import linear, multiply_columns


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


@pytest.mark.parametrize("options", [{}, compiler_options()], ids=["plain", "as served"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 40), (6, 7), (64, 1), (12, 4096), (1023, 33)])
def test_bfloat16_products_are_summed_in_float32(rows, inputs, tokens, options):
    weight, columns = draw(0, rows, inputs), draw(1, inputs, tokens)
    wide = np.asarray(weight, np.float64), np.asarray(columns, np.float64)
    expected, room = wide[0] @ wide[1], 1e-6 * (np.abs(wide[0]) @ np.abs(wide[1]))
    for function, x in ((multiply_columns, columns), (lambda w, x: linear(w, x).T, columns.T)):
        y = jax.jit(function, compiler_options=options)(weight, x)
        assert y.shape == (rows, tokens)
        slack = 0 if y.dtype == jnp.float32 else np.abs(expected) * 2**-8
        assert (np.abs(np.asarray(y, np.float64) - expected) <= room + slack).all()


@pytest.mark.parametrize("tokens", [2, 4, 6])
def test_a_column_of_nan_leaves_the_others_alone(tokens):
    weight, columns = draw(0, 64, 128), draw(1, 128, tokens).at[:, 1].set(jnp.nan)
    multiply = jax.jit(multiply_columns, compiler_options=compiler_options())
    nan = np.isnan(np.asarray(multiply(weight, columns)))
    assert nan[:, 1].all() and nan.sum() == 64
