"""Floating-point arrays as whole numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bits import as_bits, from_bits


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_bits_are_kept(dtype):
    x = jnp.asarray([0.0, -0.0, 1.5, jnp.inf, jnp.nan], dtype)
    bits = as_bits(x)
    assert bits.dtype == (jnp.uint16 if dtype == jnp.bfloat16 else jnp.uint32)
    np.testing.assert_array_equal(as_bits(from_bits(bits, x.dtype)), bits)
