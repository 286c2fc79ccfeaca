"""Products with [out, in] weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from host_offload.host_compute import compiler_options
from moe_jax.model.ops import gated_ffn, linear, multiply_columns


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


@pytest.mark.parametrize("options", [{}, compiler_options()], ids=["plain", "as served"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 40), (6, 7), (64, 1), (12, 4096), (1023, 33)])
def test_bfloat16_products_are_summed_in_float32(rows, inputs, tokens, options, any_processor):
    weight, columns = draw(0, rows, inputs), draw(1, inputs, tokens)
    wide = np.asarray(weight, np.float64), np.asarray(columns, np.float64)
    expected, room = wide[0] @ wide[1], 1e-6 * (np.abs(wide[0]) @ np.abs(wide[1]))
    for function, x in ((multiply_columns, columns), (lambda w, x: linear(w, x).T, columns.T)):
        y = jax.jit(function, compiler_options=options)(weight, x)
        assert y.shape == (rows, tokens)
        slack = 0 if y.dtype == jnp.float32 else np.abs(expected) * 2**-8
        assert (np.abs(np.asarray(y, np.float64) - expected) <= room + slack).all()


@pytest.mark.parametrize("tokens", [2, 4, 6])
def test_a_column_of_nan_leaves_the_others_alone(tokens, any_processor):
    weight, columns = draw(0, 64, 128), draw(1, 128, tokens).at[:, 1].set(jnp.nan)
    multiply = jax.jit(multiply_columns, compiler_options=compiler_options())
    nan = np.isnan(np.asarray(multiply(weight, columns)))
    assert nan[:, 1].all() and nan.sum() == 64


@pytest.mark.parametrize("tokens", [1, 3, 16, 128])
def test_a_gated_product_is_the_same_in_every_form(tokens, any_processor):
    gate_up, down, x = draw(0, 48, 40), draw(1, 40, 24), draw(2, tokens, 40)
    run = jax.jit(gated_ffn, static_argnums=3, compiler_options=compiler_options())
    gate, up = np.split(np.asarray(x, np.float32) @ np.asarray(gate_up, np.float32).T, 2, axis=1)
    hidden = np.asarray(jnp.asarray(np.maximum(gate, 0) * up, jnp.bfloat16), np.float32)
    y = run(gate_up, down, x, "relu")
    assert y.dtype == jnp.float32
    expected = hidden @ np.asarray(down, np.float32).T
    # A hidden value may be rounded to the number next to the expected one.
    room = 2**-7 * np.abs(hidden) @ np.abs(np.asarray(down, np.float32)).T
    assert (np.abs(np.asarray(y) - expected) <= room + 1e-4).all()


@pytest.mark.parametrize("tokens", [1, 4, 7, 16, 64, 128])
def test_no_weight_is_converted_to_float32(tokens, any_processor):
    """XLA:CPU does so for most forms of a product, at a tenth of the speed."""
    gate_up, down, x = draw(0, 1024, 256), draw(1, 256, 512), draw(2, tokens, 256)

    def run(gate_up, down, x):
        return gated_ffn(gate_up, down, x, "silu"), linear(gate_up, x)

    program = jax.jit(run, compiler_options=compiler_options()).lower(gate_up, down, x).compile()
    made = [line for line in program.as_text().splitlines() if " fusion(" in line]
    assert made
    # The sums of a few tokens' products read the weight as it is.
    assert not [line for line in made if "= f32[1024,256]" in line or "= f32[256,512]" in line]
