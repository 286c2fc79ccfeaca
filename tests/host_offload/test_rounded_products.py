"""Products of bfloat16 with results in bfloat16."""

import functools
import gc
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from host_offload import rounded_products
from host_offload.rounded_products import jit_rounded, rounding_pays


@pytest.mark.parametrize("vectors, units, pays", [(1, 0, True), (1, 1, False), (0, 0, False)])
def test_rounding_pays_for_bfloat16_in_vectors(vectors, units, pays, monkeypatch):
    monkeypatch.setattr(rounded_products, "multiplies_bfloat16", lambda: bool(vectors))
    monkeypatch.setattr(rounded_products, "has_matrix_units", lambda: bool(units))
    assert rounding_pays("bfloat16") is pays
    assert not rounding_pays(np.float32)


@pytest.mark.skipif(not rounding_pays("bfloat16"), reason="rounded products do not pay here")
@pytest.mark.parametrize("columns", [16, 100])
def test_they_are_onednns_and_rounded_once(columns):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)
    weight, x = draw(1024, 512), draw(512, columns)
    multiply = jit_rounded(functools.partial(lax.dot, preferred_element_type=jnp.bfloat16))
    program = multiply.lower(weight, x).compile()
    assert "__onednn" in program.as_text()
    exact = np.asarray(weight, np.float32) @ np.asarray(x, np.float32)
    off = np.abs(np.asarray(program(weight, x), np.float32) - exact)
    assert (off <= 2**-8 * np.abs(exact) + 1e-4).all()


def test_arguments_keep_their_names():
    run = jit_rounded(lambda x, scale: x * scale, static_argnames="scale")
    np.testing.assert_array_equal(run(jnp.arange(3), scale=2), [0, 2, 4])


def test_programs_outlive_their_owners_for_a_while():
    program = jit_rounded(lambda x: x)
    kept = weakref.ref(program)
    del program
    gc.collect()
    assert kept() is not None
    for _ in range(64):
        jit_rounded(lambda x: x)
    gc.collect()
    assert kept() is None
