"""Experts in int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from host_offload.host_compute import compiler_options, on_host
from host_offload.memory import sharding
from moe_jax.model.int8 import (
    Int8Expert,
    gated_ffn_int8,
    int8_bytes,
    multiply_int8,
    quantize_rows,
)
from moe_jax.model.ops import gated_ffn


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def make_expert(embed, ffn):
    gate_up, down = draw(0, 2 * ffn, embed), draw(1, embed, ffn)
    return Int8Expert(*quantize_rows(gate_up), *quantize_rows(down)), gate_up, down


@pytest.mark.parametrize("options", [{}, compiler_options()], ids=["plain", "as served"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40, 128])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 40), (6, 7), (64, 1), (12, 4096), (1023, 33)])
def test_products_are_exact(rows, inputs, tokens, options, any_processor):
    rng = np.random.default_rng(2)
    weight = rng.integers(-127, 128, (rows, inputs), np.int8)
    x = rng.integers(-127, 128, (tokens, inputs), np.int8)
    multiply = jax.jit(multiply_int8, compiler_options=options)
    expected = x.astype(np.int64) @ weight.astype(np.int64).T
    np.testing.assert_array_equal(multiply(weight, x), expected)


def test_the_largest_sum_of_a_real_expert_fits():
    weight, x = np.full((8, 28672), 127, np.int8), np.full((1, 28672), -127, np.int8)
    assert (np.asarray(jax.jit(multiply_int8)(weight, x)) == -28672 * 127**2).all()


def test_numbers_are_rounded_to_127_steps_of_their_own_scale():
    weight = draw(3, 5, 64) * jnp.asarray([1e-6, 1.0, 1e4, 0.0, 3.0])[:, None]
    whole, scale = quantize_rows(weight)
    assert whole.dtype == jnp.int8 and scale.shape == (5,)
    np.testing.assert_allclose(scale * 127, jnp.abs(weight).max(axis=1), rtol=1e-6)
    assert jnp.abs(whole.astype(jnp.int32)).max(axis=1).tolist() == [127, 127, 127, 0, 127]
    off = jnp.abs(whole.astype(jnp.float32) * scale[:, None] - weight)
    assert (off <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_an_expert_is_close_to_the_one_it_was_made_from(tokens):
    expert, gate_up, down = make_expert(64, 96)
    x = draw(4, tokens, 64)
    got = gated_ffn_int8(expert, x, "silu")
    expected = gated_ffn(gate_up, down, x, "silu")
    error = jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)
    assert 0 < error < 0.02
    assert sum(part.nbytes for part in expert) == int8_bytes(((192, 64), (64, 96)))


def test_a_token_has_the_same_result_in_any_company():
    expert, _, _ = make_expert(64, 96)
    x = draw(4, 20, 64)
    run = jax.jit(lambda x: gated_ffn_int8(expert, x, "silu"), compiler_options=compiler_options())
    whole = run(x)
    for width in (1, 2, 4, 16):
        np.testing.assert_allclose(run(x[:width]), whole[:width], rtol=1e-6)


def test_empty_rows_stay_empty_and_nan_stays_in_its_row():
    expert, _, _ = make_expert(64, 96)
    x = draw(4, 5, 64).at[1].set(0).at[3].set(jnp.nan)
    y = np.asarray(gated_ffn_int8(expert, x, "silu"))
    assert (y[1] == 0).all() and np.isnan(y[3]).all() and np.isnan(y).sum() == 64


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_it_runs_in_a_host_computation(tokens):
    expert, _, _ = make_expert(64, 96)
    x = draw(4, tokens, 64, dtype=jnp.bfloat16)
    hosted = jax.device_put(expert, sharding("pinned_host"))

    def body(expert, x):
        x = jax.device_put(x, jax.memory.Space.Host)
        return gated_ffn_int8(expert, x, "silu")

    y = jax.jit(lambda expert, x: on_host(body, expert, x))(hosted, x)
    np.testing.assert_allclose(y, gated_ffn_int8(expert, x, "silu"), rtol=1e-5, atol=1e-5)


def test_rows_of_bfloat16_are_taken_as_they_are():
    x = draw(5, 3, 16, dtype=jnp.bfloat16)
    for part, other in zip(quantize_rows(x), quantize_rows(x.astype(jnp.float32)), strict=True):
        np.testing.assert_array_equal(part, other)
