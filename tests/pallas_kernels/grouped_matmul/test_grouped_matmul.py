import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.shapes import EXPERTS
from pallas_kernels.grouped_matmul.xla import rows_per_block
from tests.pallas_kernels.grouped_matmul.cases import check, implementations, multiply
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


@implementations
@pytest.mark.parametrize("unused_rows, dtype", [(1, "float32"), (9, "bfloat16")])
@pytest.mark.parametrize("name", SIZES)
def test_values(name, unused_rows, dtype, implementation):
    check(SIZES[name], unused_rows, dtype, implementation)


@implementations
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gated, weighted", [(True, False), (False, True), (True, True)])
def test_gates_and_row_weights(gated, weighted, dtype, implementation):
    check(SIZES["ragged"], 5, dtype, implementation, gated=gated, weighted=weighted)


@implementations
@pytest.mark.parametrize("width", [(136, 264), (7, 2), (300, 30), (2880, 16), (16, 2880)])
def test_widths_that_are_no_multiple_of_a_tile(width, implementation):
    check((3, 0, 20), 2, "float32", implementation, width=width, gated=True)


@implementations
@pytest.mark.parametrize("name", EXPERTS)
def test_the_experts_of_real_models_with_a_thin_ffn(name, implementation):
    """Their groups, choices and widths; the other axis is cut down so that it runs here."""
    shape = EXPERTS[name]
    sizes = np.bincount(
        np.random.default_rng(0).integers(0, shape.experts, 3 * shape.choices),
        minlength=shape.experts,
    )
    sizes = tuple(sizes.tolist())
    check(sizes, 1, "bfloat16", implementation, width=(shape.embed, 32), gated=True)
    check(sizes, 1, "bfloat16", implementation, width=(48, shape.embed), weighted=True)


@pytest.mark.accelerator
@pytest.mark.parametrize("tokens", [1, 64, 512])
@pytest.mark.parametrize("name", EXPERTS)
def test_real_models_at_full_size(name, tokens, accelerator):
    shape = EXPERTS[name]
    key = jax.random.key(0)
    sizes = jnp.bincount(
        jax.random.randint(key, tokens * shape.choices, 0, shape.experts), length=shape.experts
    )
    for outputs, inputs, gated in (
        (2 * shape.ffn, shape.embed, True),
        (shape.embed, shape.ffn, False),
    ):
        rows = jax.random.normal(key, (tokens * shape.choices, inputs), jnp.bfloat16)
        weights = jax.random.normal(key, (shape.experts, outputs, inputs), jnp.bfloat16)
        weights = weights * jnp.bfloat16(inputs**-0.5)
        run = functools.partial(multiply, rows, weights, sizes, gated=gated)
        assert_close(run(implementation=accelerator), run(implementation="xla"))


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
    "odd gate": (
        dict(weights=jnp.zeros((2, 5, 3)), gated=True),
        r"gated needs an even number of outputs, got weights \(2, 5, 3\)",
    ),
    "row weights": (
        dict(row_weights=jnp.zeros(3)),
        r"row_weights must be float32 of shape \(4,\), one per row; got float32 of shape \(3,\)",
    ),
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
