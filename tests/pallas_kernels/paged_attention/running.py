"""Runs a case through an implementation and compares with the oracle."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import IMPLEMENTATIONS, paged_attention
from tests.pallas_kernels.implementations import runnable
from tests.pallas_kernels.paged_attention.cases import Case, by_hand
from tests.tolerances import assert_close

SCALE = 0.125
implementations = pytest.mark.parametrize("implementation", runnable(IMPLEMENTATIONS))


@functools.partial(
    jax.jit,
    static_argnames=("max_query_length", "implementation", "sliding_window", "soft_cap"),
)
def attend(*arrays, **options):
    return paged_attention(*arrays, scale=SCALE, return_log_sum_exp=True, **options)


def run(case: Case, arrays, implementation: str, **options):
    return attend(
        *arrays,
        max_query_length=case.max_query_length,
        implementation=implementation,
        **options,
    )


def check(case: Case, dtype: str, implementation: str, window=None, soft_cap=None, sinks=None):
    arrays = case.arrays(dtype)
    output, log_sum_exp = run(
        case, arrays, implementation, sliding_window=window, soft_cap=soft_cap, sinks=sinks
    )
    expected, expected_log = by_hand(
        case, arrays, scale=SCALE, window=window, soft_cap=soft_cap, sinks=sinks
    )
    assert output.dtype == arrays[0].dtype
    assert log_sum_exp.dtype == jnp.float32
    assert_close(output, expected)
    assert_close(log_sum_exp, expected_log, dtype)
