"""Decides per expert of one layer call: run where it is, bring its weights over, or use the host.

The decision minimises the time until device, link and host have all finished. Knows token counts
and cost curves; nothing about weights.
"""

import enum
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moe_jax.placement.curves import CostCurves, seconds


class Mode(enum.IntEnum):
    """Where an expert runs in one layer call."""

    IDLE = 0
    RESIDENT = 1
    STREAM = 2
    HOST = 3


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerPlan:
    """The decision for one layer call.

    Attributes:
      mode: a `Mode` per expert.
      streams: how many experts are brought over.
      predicted: seconds until everything has finished.
      lower_bound: seconds no choice of experts to stream can beat.
    """

    mode: Int[Array, " experts"]
    streams: Int[Array, ""]
    predicted: Float[Array, ""]
    lower_bound: Float[Array, ""]


def plan_layer(
    counts: Int[Array, " experts"],
    resident: Bool[Array, " experts"],
    curves: CostCurves,
    max_streams: int | None = None,
) -> LayerPlan:
    """Plans one layer call from each expert's tokens and whether it is resident.

    Of the missing experts, sorted by falling token count, the best set to stream is a prefix: a
    swap that streams the busier of two experts never lengthens any of the three times, as long as
    the host's cost does not fall with tokens and the device's is equal for both. All prefixes are
    scored at once; the first best one moves the fewest bytes. Where the device's cost differs
    between experts the plan is within (largest - smallest) of it, and `lower_bound` says how far.
    """
    experts = counts.shape[0]
    active = counts > 0
    missing = active & ~resident
    tokens = counts.astype(jnp.float32)
    host_cost = seconds(curves.tokens, curves.host, tokens)
    device_cost = seconds(curves.tokens, curves.device, tokens)
    resident_seconds = jnp.sum(jnp.where(active & resident, device_cost, 0))
    order = jnp.argsort(jnp.where(missing, -counts, 1), stable=True)
    is_missing = missing[order]
    total_missing = jnp.sum(missing, dtype=jnp.int32)
    prefix = jnp.arange(experts + 1, dtype=jnp.int32)

    link = _times(prefix.astype(jnp.float32), curves.stream)
    link = jnp.where(prefix > 0, link + curves.link_latency, 0)
    host = _suffix_sums(jnp.where(is_missing, host_cost[order], 0))
    host = host + jnp.where(prefix < total_missing, curves.host_launch, 0)
    streamed = jnp.where(is_missing, device_cost[order], 0)
    device = resident_seconds + _prefix_sums(streamed)
    # The device cannot compute what the link has not delivered: after the j-th arrival it still
    # has the work of experts j and later.
    arrivals = jnp.where(is_missing, link[1:] - _prefix_sums(streamed)[:-1], -jnp.inf)
    waiting = _prefix_sums(streamed) + jnp.append(-jnp.inf, lax.cummax(arrivals))
    device = jnp.maximum(device, waiting)
    memory = _times(total_missing.astype(jnp.float32), curves.memory)

    makespan = jnp.maximum(jnp.maximum(host, link), jnp.maximum(device, memory))
    allowed = prefix <= total_missing
    if max_streams is not None:
        allowed &= prefix <= max_streams
    makespan = jnp.where(allowed, makespan, jnp.inf)
    streams = jnp.argmin(makespan).astype(jnp.int32)

    rank = jnp.zeros(experts, jnp.int32).at[order].set(jnp.arange(experts, dtype=jnp.int32))
    missing_mode = jnp.where(rank < streams, Mode.STREAM, Mode.HOST)
    mode = jnp.where(resident, Mode.RESIDENT, missing_mode)
    cheapest = jnp.sort(jnp.where(missing, device_cost, jnp.inf))
    bound = jnp.maximum(
        jnp.maximum(host, memory),
        jnp.maximum(
            jnp.where(prefix > 0, link + cheapest[0], 0),
            resident_seconds + _prefix_sums(jnp.where(jnp.isinf(cheapest), 0, cheapest)),
        ),
    )
    return LayerPlan(
        mode=jnp.where(active, mode, Mode.IDLE).astype(jnp.int32),
        streams=streams,
        predicted=makespan[streams],
        lower_bound=jnp.min(jnp.where(allowed, bound, jnp.inf)),
    )


def _prefix_sums(x: Float[Array, " n"]) -> Float[Array, " n+1"]:
    """Sums of the first 0, 1, ... n entries."""
    return jnp.append(jnp.float32(0), jnp.cumsum(x))


def _suffix_sums(x: Float[Array, " n"]) -> Float[Array, " n+1"]:
    """Sums of all but the first 0, 1, ... n entries; no difference, so infinities are safe."""
    return jnp.append(jnp.cumsum(x[::-1])[::-1], jnp.float32(0))


def _times(count: Float[Array, "*n"], cost: Float[Array, ""]) -> Float[Array, "*n"]:
    """count · cost, where nothing of an infinite cost is nothing."""
    return jnp.where(count > 0, count * cost, 0)
