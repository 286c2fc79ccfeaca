"""Where each expert of a layer runs in this call: exact, jitted, a pure function of numbers.

Knows neither clocks nor devices: token counts, residency and cost curves come in, a plan goes out.

The layer takes as long as its busiest resource. With S the experts that are streamed and H those
that run on the host (the missing experts are split between the two):

    host    host_launch + the host seconds of H, one expert after another
    device  the device seconds of the resident experts and of S, and no sooner than S arrives:
            link_latency + j * stream for the j-th; largest first is optimal (Johnson's rule)
    memory  memory * (experts in S and H)

Where the host or the link cannot work beside the device, their seconds are added to the device's.

If all missing experts share one curve each, the host curve does not decrease and the device curve
is flat over their counts, some prefix of them in order of falling counts is an optimal S: swapping
a streamed expert for a host one with more tokens changes no other term and shortens the host's.
So all prefixes are scored and the first best one is taken; being the shortest, it moves the fewest
bytes. Where the device curve is not flat, `LayerPlan.lower_bound` tells how far from the optimum
the plan can be at most.
"""

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.placement.curves import CostCurves


class Mode(enum.IntEnum):
    """How one expert runs in one call."""

    IDLE = 0  # it got no token
    RESIDENT = 1  # on the device, its weights being there
    STREAM = 2  # on the device, its weights brought over for this call
    HOST = 3  # on the host


@no_type_check  # jax rebuilds it with shapes, shardings and batched leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The plan of one layer in one call.

    Attributes:
      mode: int32, a `Mode` per expert.
      streams: int32, how many experts are streamed.
      predicted: float32 seconds the layer's experts take. Infinite: no plan can be executed.
      lower_bound: float32 seconds that no split of the missing experts can beat.
    """

    mode: Int[Array, " experts"]
    streams: Int[Array, ""]
    predicted: Float[Array, ""]
    lower_bound: Float[Array, ""]


# (counts, resident, curves) -> plan, jittable; `plan_layer` is one.
Planner = Callable[[Int[Array, " experts"], Bool[Array, " experts"], CostCurves], LayerPlan]


def plan_layer(
    counts: Int[Array, " experts"],
    resident: Bool[Array, " experts"],
    curves: CostCurves,
    max_streams: int | Int[Array, ""] | None = None,
) -> LayerPlan:
    """Chooses for every expert with tokens: resident, streamed or host.

    Equal counts are streamed in the order of their ids. The objective, the theorem and the bound
    are this project's; the choice by token count is Fiddler's (arXiv 2402.07033).

    Args:
      counts: tokens routed to each expert, not negative.
      resident: whether an expert's weights are on the device.
      curves: costs of the layer's experts.
      max_streams: at most this many experts are streamed (free slots); None: no limit.
    """
    experts = counts.shape[0]
    counts = counts.astype(jnp.int32)
    missing = (counts > 0) & ~resident
    count = jnp.sum(missing)
    ids = jnp.arange(experts, dtype=jnp.int32)
    # Falling counts, equal ones by id; experts that are not missing come last, as zeros.
    negated, order = jax.lax.sort((jnp.where(missing, -counts, 0), ids), num_keys=1)
    host = jnp.where(negated < 0, curves.host_seconds(-negated), 0)
    device = jnp.where(negated < 0, curves.device_seconds(-negated), 0)
    busy = jnp.where(resident & (counts > 0), curves.device_seconds(counts), 0).sum()

    # Candidate m streams the first m, m = 0 .. experts. The host's rest is summed from the end:
    # as a difference of running sums it would be NaN for infinite costs.
    m = jnp.arange(experts + 1, dtype=jnp.int32)
    launch = jnp.where(m < count, curves.host_launch, 0)
    on_host = launch + jnp.append(jax.lax.cumsum(host, reverse=True), 0.0)
    done = jnp.append(0.0, jax.lax.cumsum(device))
    # The device works without a pause from the arrival of some j-th expert to the end.
    arrival = curves.link_latency + m[1:].astype(jnp.float32) * curves.stream
    after_link = done[1:] + jax.lax.cummax(arrival - done[:-1])
    memory = count.astype(jnp.float32) * curves.memory
    total = _together(on_host, busy + done, after_link, arrival, memory, curves)

    allowed = m <= count if max_streams is None else m <= jnp.minimum(count, max_streams)
    total = jnp.where(allowed, total, jnp.inf)
    best = jnp.argmin(total)

    # For any S of m experts: the host cannot have less to do than without the m largest, the link
    # must bring m and one must run after it, and the device has at least the m shortest to do.
    shortest = jnp.sort(jnp.where(negated < 0, device, jnp.inf))
    least_device = busy + jnp.append(0.0, jax.lax.cumsum(shortest))
    bound = _together(on_host, least_device, arrival + shortest[0], arrival, memory, curves)
    bound = jnp.where(allowed, bound, jnp.inf).min()

    # An expert is streamed if it does not come after the last one that is.
    last_rank = jnp.maximum(best - 1, 0)
    last_negated, last_id = negated[last_rank], order[last_rank]
    before = (-counts < last_negated) | ((-counts == last_negated) & (ids <= last_id))
    placed = jnp.where(before & (best > 0), Mode.STREAM.value, Mode.HOST.value)
    placed = jnp.where(resident, Mode.RESIDENT.value, placed)
    return LayerPlan(
        mode=jnp.where(counts > 0, placed, Mode.IDLE.value).astype(jnp.int32),
        streams=best.astype(jnp.int32),
        predicted=total[best],
        lower_bound=jnp.minimum(bound, total[best]),  # equal but for rounding, where it is tight
    )


@no_type_check  # NumPy arrays will do
@functools.partial(jax.jit, static_argnums=0)
def plan_layers(
    planner: Planner,
    counts: Int[Array, "layers experts"],
    resident: Bool[Array, "layers experts"],
    curves: CostCurves,
) -> LayerPlan:
    """The plans of all layers of a step; every field has an axis of layers in front."""
    return jax.vmap(planner, in_axes=(0, 0, None))(counts, resident, curves)


def _together(
    on_host: Float[Array, " candidates"],
    on_device: Float[Array, " candidates"],
    after_link: Float[Array, " streams"],
    arrival: Float[Array, " streams"],
    memory: Float[Array, ""],
    curves: CostCurves,
) -> Float[Array, " candidates"]:
    """Seconds until all are done; the link's arrays lack the candidate that streams nothing."""
    beside = jnp.maximum(on_device, jnp.append(0.0, after_link))
    behind = on_device + jnp.append(0.0, arrival)
    device = jnp.where(curves.link_beside > 0, beside, behind)
    total = jnp.where(curves.host_beside > 0, jnp.maximum(on_host, device), on_host + device)
    return jnp.maximum(total, memory)
