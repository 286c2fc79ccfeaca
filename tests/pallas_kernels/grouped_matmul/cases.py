"""Grouped products with NaN in everything that must not be read, and what must come out.

Knows what the operation means, and nothing about how it is computed.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul
from tests.pallas_kernels.implementations import runnable
from tests.tolerances import assert_close

implementations = pytest.mark.parametrize("implementation", runnable(IMPLEMENTATIONS))
multiply = functools.partial(jax.jit, static_argnames=("implementation", "gated"))(grouped_matmul)


def check(sizes, unused_rows, dtype, implementation, seed=0, width=(24, 40), **options):
    """Compares with NumPy; what belongs to no row is NaN."""
    arrays, expected = draw(sizes, unused_rows, dtype, seed, width, **options)
    gated = options.get("gated", False)
    rows, weights, group_sizes, factors = arrays
    result = multiply(
        rows, weights, group_sizes, gated=gated, row_weights=factors, implementation=implementation
    )
    assert result.dtype == arrays[0].dtype
    assert_close(result, expected)


def draw(sizes, unused_rows, dtype, seed, width, *, gated=False, weighted=False):
    """Rows, weights, sizes and row weights, and what must come out, in float64."""
    random = np.random.default_rng(seed)
    used, (inputs, outputs) = sum(sizes), width
    rows = random.standard_normal((used + unused_rows, inputs))
    rows[used:] = np.nan
    weights = random.standard_normal((len(sizes), outputs, inputs)) / inputs**0.5
    weights[np.array(sizes) == 0] = np.nan
    factors = random.random(used + unused_rows)
    factors[used:] = np.nan
    rows, weights = jnp.asarray(rows, dtype), jnp.asarray(weights, dtype)
    factors = jnp.asarray(factors, jnp.float32)
    expected = np.zeros((used + unused_rows, outputs // (2 if gated else 1)))
    starts = np.cumsum([0, *sizes])
    for group, (start, end) in enumerate(itertools.pairwise(starts)):
        matrix = np.asarray(weights[group], np.float64)
        product = np.asarray(rows[start:end], np.float64) @ matrix.T
        if gated:
            gate, up = np.split(product, 2, axis=1)
            product = gate / (1 + np.exp(-gate)) * up
        if weighted:
            product *= np.asarray(factors[start:end], np.float64)[:, None]
        expected[start:end] = product
    return (rows, weights, jnp.array(sizes), factors if weighted else None), expected
