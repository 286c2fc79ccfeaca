import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul
from pallas_kernels.grouped_matmul.xla import rows_per_block
from tests.tolerances import assert_close

SIZES = {
    "even": (4, 4, 4),
    "ragged": (1, 0, 7, 3),
    "one hot group": (0, 0, 40, 0, 0, 0),
    "one group": (5,),
    "nothing": (0, 0),
    "larger than a block": (70, 0, 130, 1) + 12 * (0,),
    "more groups than rows": (0, 1, 0, 0, 0, 1, 0, 0, 0),
}
implementations = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
multiply = functools.partial(jax.jit, static_argnames="implementation")(grouped_matmul)


def check(sizes, unused_rows, dtype, implementation, seed=0):
    """Compares with NumPy; what belongs to no row is NaN."""
    random = np.random.default_rng(seed)
    used = sum(sizes)
    rows = random.standard_normal((used + unused_rows, 24))
    rows[used:] = np.nan
    weights = random.standard_normal((len(sizes), 40, 24))
    weights[np.array(sizes) == 0] = np.nan
    rows, weights = jnp.asarray(rows, dtype), jnp.asarray(weights, dtype)
    result = multiply(rows, weights, jnp.array(sizes), implementation=implementation)

    expected = np.zeros((used + unused_rows, 40))
    starts = np.cumsum([0, *sizes])
    for group, (start, end) in enumerate(itertools.pairwise(starts)):
        matrix = np.asarray(weights[group], np.float64)
        expected[start:end] = np.asarray(rows[start:end], np.float64) @ matrix.T
    assert result.dtype == rows.dtype
    assert_close(result, expected)


@implementations
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("unused_rows", [1, 9])
@pytest.mark.parametrize("name", SIZES)
def test_values(name, unused_rows, dtype, implementation):
    check(SIZES[name], unused_rows, dtype, implementation)


@implementations
@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 60), min_size=5, max_size=5), seed=st.integers(0, 9))
def test_ragged_groups(implementation, cuts, seed):
    sizes = np.diff([0, *sorted(cuts)])
    check(tuple(int(n) for n in sizes), 60 - int(sizes.sum()), "float32", implementation, seed)


def test_group_sizes_do_not_recompile_and_the_bank_is_not_copied():
    traces = []

    @jax.jit
    def step(rows, weights, sizes):
        traces.append(1)
        return grouped_matmul(rows, weights, sizes, implementation="xla")

    rows, weights = jnp.ones((16, 64)), jnp.ones((64, 128, 64))
    for first in (0, 5, 16):
        step(rows, weights, jnp.zeros(64, jnp.int32).at[0].set(first))
    assert len(traces) == 1
    compiled = step.lower(rows, weights, jnp.zeros(64, jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < weights.nbytes / 8


@pytest.mark.parametrize(
    "rows, groups, block",
    [(1, 1, 8), (2, 64, 8), (64, 8, 8), (72, 8, 16), (512, 8, 64), (9999, 2, 256)],
)
def test_the_block_follows_the_average_group(rows, groups, block):
    assert rows_per_block(rows, groups) == block


WRONG = {
    "rank": (dict(rows=jnp.zeros(3)), r"rows must be \[rows in\], got shape \(3,\)"),
    "dtype": (dict(rows=jnp.zeros((4, 3), jnp.int32)), "rows must be float32, bfloat16 or"),
    "other dtype": (
        dict(weights=jnp.zeros((2, 5, 3), jnp.bfloat16)),
        "weights are bfloat16 and rows float32; cast one",
    ),
    "float sizes": (dict(group_sizes=jnp.zeros(2)), "group_sizes must be integers, got float32"),
    "transposed": (
        dict(weights=jnp.zeros((2, 3, 5))),
        r"weights \(2, 3, 5\) take rows of 5 numbers, got rows \(4, 3\)",
    ),
    "groups": (
        dict(group_sizes=jnp.zeros(3, jnp.int32)),
        "group_sizes must have groups = 2 entries, got 3",
    ),
    "empty": (dict(rows=jnp.zeros((0, 3))), r"no axis may be empty: rows \(0, 3\)"),
    "implementation": (
        dict(implementation="ragged_dot"),
        "grouped_matmul has no implementation 'ragged_dot'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name):
    change, message = WRONG[name]
    arguments = dict(
        rows=jnp.zeros((4, 3)),
        weights=jnp.zeros((2, 5, 3)),
        group_sizes=jnp.zeros(2, jnp.int32),
    )
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(arguments | change))
