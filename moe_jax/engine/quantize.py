"""Rounds experts to int8 in host memory, by the host's processor, one array at a time."""

import jax
import numpy as np
from jaxtyping import Array, Float, Int8

from host_offload.memory import host_device
from moe_jax.model.experts import Expert
from moe_jax.model.int8 import Int8Expert, quantize_rows

_quantize = jax.jit(quantize_rows)


def store_rows_in_int8(
    weight: Float[Array, "out in"],
) -> tuple[Int8[Array, "out in"], Float[Array, " out"]]:
    """The weight in int8 and the scales of its rows, in the memory that the weight is in."""
    parts = _quantize(jax.device_put(np.asarray(weight), host_device()))
    return tuple(jax.device_put(np.asarray(part), weight.sharding) for part in parts)


def store_in_int8(expert: Expert) -> Int8Expert:
    """An expert in int8, in the memory that it is in."""
    gate_up, down = map(store_rows_in_int8, expert)
    return Int8Expert(*gate_up, *down)
