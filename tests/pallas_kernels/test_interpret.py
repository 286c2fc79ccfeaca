"""The interpreter must find what the tests of TPU kernels trust it to find."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interpret import TPU_INTERPRETER

SHAPE = (8, 128)


def copy_through_scratch(wait: bool):
    """A kernel that copies [8 128] by way of VMEM, if it waits for the copy."""

    def kernel(source, target, scratch, done):
        copy = pltpu.make_async_copy(source, scratch, done)
        copy.start()
        if wait:
            copy.wait()
        target[...] = scratch[...]
        if not wait:
            copy.wait()

    return pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(SHAPE, jnp.float32),
        scratch_shapes=[pltpu.VMEM(SHAPE, jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=TPU_INTERPRETER,
    )(jnp.ones(SHAPE))


def test_a_copy_that_is_waited_for():
    assert copy_through_scratch(wait=True).tolist() == jnp.ones(SHAPE).tolist()


def test_a_copy_that_is_not_waited_for_is_a_race(found_race):
    try:
        copy_through_scratch(wait=False).block_until_ready()
    except Exception as error:
        assert "race" in str(error).lower()
    else:
        assert found_race()


def test_memory_that_nobody_wrote_is_nan():
    def kernel(target, scratch):
        target[...] = scratch[...]

    result = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(SHAPE, jnp.float32),
        scratch_shapes=[pltpu.VMEM(SHAPE, jnp.float32)],
        interpret=TPU_INTERPRETER,
    )()
    assert jnp.isnan(result).all()


def test_a_read_outside_an_array_raises():
    def kernel(start, source, target):
        target[...] = source[pl.ds(start[0], 8), :]

    with pytest.raises(Exception, match=r"(?i)out-of-bounds|out of bounds"):
        pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)],
                out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
            ),
            out_shape=jax.ShapeDtypeStruct(SHAPE, jnp.float32),
            interpret=TPU_INTERPRETER,
        )(jnp.array([4]), jnp.ones(SHAPE)).block_until_ready()
