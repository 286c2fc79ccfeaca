from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.placement.machines import (
    BANDWIDTH_SHARE,
    COMPUTE_SHARE,
    MACHINES,
    curves_for,
    expert_bytes,
    machine_named,
)
from moe_jax.placement.planner import plan_layer

EMBED, FFN = 4096, 14336  # Mixtral-8x7B
BYTES = 3 * EMBED * FFN * 2


@pytest.mark.parametrize("name", MACHINES)
def test_curves_are_flat_and_then_linear(name):
    machine = machine_named(name)
    assert machine.name == name and machine.source
    assert expert_bytes(EMBED, FFN, 2) == BYTES
    curves = curves_for(machine, EMBED, FFN)
    n = np.array([1, 3, 47, 130, 1500, 5000, 40_000])
    for read, flops, launch, curve in (
        (machine.host_read, machine.host_flops, 0.0, curves.host_seconds),
        (machine.device_read, machine.device_flops, machine.device_launch, curves.device_seconds),
    ):
        expected = launch + np.maximum(
            BYTES / (read * BANDWIDTH_SHARE), BYTES * n / (flops * COMPUTE_SHARE)
        )
        np.testing.assert_allclose(curve(jnp.asarray(n)), expected, rtol=1e-3)
        assert (np.diff(curves.tokens) > 0).all()
    np.testing.assert_allclose(curves.stream, BYTES / machine.link_rate / BANDWIDTH_SHARE)
    np.testing.assert_allclose(curves.memory, BYTES / machine.host_read / BANDWIDTH_SHARE)


def test_bytes_and_operations_scale_with_the_format():
    one, two = (curves_for(MACHINES["h200"], 128, 64, itemsize) for itemsize in (1, 2))
    np.testing.assert_allclose(2 * one.stream, two.stream)
    many = jnp.int32(100_000)  # bound by operations, whatever the format
    np.testing.assert_allclose(one.host_seconds(many), two.host_seconds(many), rtol=1e-5)


@pytest.mark.parametrize("name", MACHINES)
def test_pieces_share_bytes_and_operations_but_not_the_launch(name):
    machine = MACHINES[name]
    one, four = (curves_for(machine, EMBED, FFN, pieces=pieces) for pieces in (1, 4))
    n = jnp.array([1, 3, 47, 130, 1500, 40_000])
    np.testing.assert_allclose(4 * four.host_seconds(n), one.host_seconds(n), rtol=1e-5)
    more = 3 * machine.device_launch
    device = one.device_seconds(n) + more
    np.testing.assert_allclose(4 * four.device_seconds(n), device, rtol=1e-5)
    np.testing.assert_allclose(4 * four.stream, one.stream, rtol=1e-6)
    np.testing.assert_allclose(4 * four.memory, one.memory, rtol=1e-6)
    assert (four.host_launch, four.link_latency) == (one.host_launch, one.link_latency)


def test_only_a_tpu_computes_on_the_host_beside_nothing():
    beside = {
        name: float(curves_for(machine, EMBED, FFN).host_beside)
        for name, machine in MACHINES.items()
    }
    assert beside == {"rtx4090": 1, "h200": 1, "gh200": 1, "v5e": 0}


def test_a_machine_that_overlaps_nothing_is_slower_and_streams_more():
    counts, resident = jnp.full(8, 100, jnp.int32), jnp.zeros(8, bool)
    tpu, plan = MACHINES["v5e"], jax.jit(plan_layer)
    serial, parallel = (
        plan(counts, resident, curves_for(replace(tpu, serial_host=s), EMBED, FFN))
        for s in (True, False)
    )
    assert serial.predicted > parallel.predicted
    assert int(serial.streams) == 8 > int(parallel.streams) > 0


def test_unknown_machines_are_refused():
    with pytest.raises(ValueError) as error:
        machine_named("abacus")
    assert str(error.value) == (
        "no machine is called 'abacus'; choose one of rtx4090, h200, gh200, v5e"
    )


def test_rates_and_sizes_are_checked():
    with pytest.raises(ValueError) as error:
        replace(MACHINES["h200"], link_rate=0.0)
    assert str(error.value) == "h200: link_rate is 0.0; a rate must be positive"
    with pytest.raises(ValueError) as error:
        curves_for(MACHINES["h200"], 0, FFN)
    assert str(error.value) == "{'embed': 0}: an expert's sizes must be positive"
    for pieces in (5, 0):
        with pytest.raises(ValueError) as error:
            curves_for(MACHINES["h200"], EMBED, FFN, pieces=pieces)
        assert str(error.value) == (
            f"ffn 14336 cannot be cut into {pieces} equal pieces; choose a divisor"
        )
