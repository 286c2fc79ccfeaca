"""Quick cost curves of one expert on this machine, measured when a model is loaded."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from host_offload.calibrate import measure_link, random_arrays, seconds_of
from host_offload.host_compute import as_host, compiler_options, on_host
from moe_jax.config import Activation, ModelConfig
from moe_jax.model.experts import Expert
from moe_jax.model.ops import gated_ffn
from moe_jax.placement.curves import CostCurves

MissingExperts = Literal["auto", "stream", "host"]

_KNOTS = (1, 16, 256)


def measure_costs(config: ModelConfig, dtype: np.dtype) -> CostCurves:
    """Times one expert of this model's shape on the host, over the link and on the device."""
    return _measure(config.expert_shapes, dtype, config.activation)


@functools.cache  # a second model of the same shape need not wait
def _measure(
    shapes: tuple[tuple[int, int], tuple[int, int]], dtype: np.dtype, activation: Activation
) -> CostCurves:
    ffn = functools.partial(gated_ffn, activation=activation)
    host_expert = Expert(*random_arrays(shapes, dtype, "pinned_host"))
    device_expert = Expert(*random_arrays(shapes, dtype, "device"))
    jit = functools.partial(jax.jit, compiler_options=compiler_options())
    on_device = jit(lambda expert, x: ffn(expert.gate_up, expert.down, x))

    def host_body(expert, x):
        return ffn(expert.gate_up, expert.down, as_host(x))

    hosted = jit(lambda expert, x: on_host(host_body, expert, x))
    host, device = [], []
    for tokens in _KNOTS:
        (x,) = random_arrays([(shapes[1][0], tokens)], dtype, "device")
        host.append(seconds_of(lambda x=x: hosted(host_expert, x)))
        device.append(seconds_of(lambda x=x: on_device(device_expert, x)))
    link = measure_link(host_expert)
    return CostCurves(
        tokens=jnp.asarray(_KNOTS, jnp.float32),
        host=_increasing(host),
        device=_increasing(device),
        stream=jnp.float32(link),
        host_launch=jnp.float32(0),
        link_latency=jnp.float32(0),
        memory=jnp.float32(0),
    )


def force(curves: CostCurves, missing_experts: MissingExperts) -> CostCurves:
    """Curves under which the planner streams, or hosts, every expert that is not resident."""
    never = lambda curve: jnp.full_like(curve, np.inf)
    match missing_experts:
        case "auto":
            return curves
        case "stream":
            return CostCurves(**(vars(curves) | {"host": never(curves.host)}))
        case "host":
            return CostCurves(**(vars(curves) | {"stream": never(curves.stream)}))


def _increasing(seconds: list[float]) -> jax.Array:
    """Noise can make more tokens look cheaper; the planner needs curves that do not fall."""
    return jnp.asarray(np.maximum.accumulate(seconds), jnp.float32)
