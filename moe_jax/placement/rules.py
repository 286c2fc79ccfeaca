"""Other ways to plan a layer, what a given plan takes, and the bound that none of them can beat.

Every rule has the signature of `planner.plan_layer`; all are judged by the same makespan.
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import LayerPlan, Mode, fiddler_streams


@no_type_check  # jax rebuilds it with batched leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ResourceSeconds:
    """When each resource has finished its part of a layer; float32 seconds, all of one shape.

    Attributes:
      host: the host computation.
      link: the last transfer.
      work: the device's resident and streamed experts, without waiting.
      waits: the same, each streamed expert waiting for its weights.
      memory: all reads of host memory at the full rate.
    """

    host: Float[Array, "*shape"]
    link: Float[Array, "*shape"]
    work: Float[Array, "*shape"]
    waits: Float[Array, "*shape"]
    memory: Float[Array, "*shape"]

    def layer(self, curves: CostCurves) -> Float[Array, "*shape"]:
        """What the layer takes: the maximum; what cannot work side by side adds up."""
        return jnp.stack(_lines(self, curves)).max(0)


def resource_seconds(
    mode: Int[Array, " experts"], counts: Int[Array, " experts"], curves: CostCurves
) -> ResourceSeconds:
    """Plays a plan through: largest count first over the link, equal ones by id.

    The same model as `planner.plan_layer`'s, for any assignment of modes.
    """
    counts = counts.astype(jnp.int32)
    streamed, on_host = mode == Mode.STREAM.value, mode == Mode.HOST.value
    host = jnp.where(on_host, curves.host_seconds(counts), 0).sum()
    host += jnp.where(on_host.any(), curves.host_launch, 0)
    busy = jnp.where(mode == Mode.RESIDENT.value, curves.device_seconds(counts), 0).sum()
    negated = jnp.sort(jnp.where(streamed, -counts, 0))
    taken = negated < 0
    work = jnp.where(taken, curves.device_seconds(-negated), 0)
    done = jnp.append(0.0, jax.lax.cumsum(work))
    place = jnp.arange(1, counts.shape[0] + 1, dtype=jnp.float32)
    arrival = jnp.where(taken, curves.link_latency + place * curves.stream, -jnp.inf)
    tail = jnp.max(jnp.where(taken, done[-1] + arrival - done[:-1], 0), initial=0.0)
    reads = jnp.sum(streamed | on_host).astype(jnp.float32)
    return ResourceSeconds(
        host=host,
        link=jnp.max(arrival, initial=0.0),
        work=busy + done[-1],
        waits=tail,
        memory=reads * curves.memory,
    )


def fiddler(
    counts: Int[Array, " experts"],
    resident: Bool[Array, " experts"],
    curves: CostCurves,
    max_streams: int | Int[Array, ""] | None = None,
) -> LayerPlan:
    """Fiddler's published rule (arXiv 2402.07033): each expert on its own goes where it is faster.

    The host is taken to need so and so much per token, from its time for one token; streaming and
    computing on the device is taken as it is. Equal: host. Arguments as for `plan_layer`.
    """
    wanted = fiddler_streams(counts, curves.device_seconds(counts), curves)
    return _plan(counts, resident, curves, max_streams, wanted)


def stream_all(
    counts: Int[Array, " experts"],
    resident: Bool[Array, " experts"],
    curves: CostCurves,
    max_streams: int | Int[Array, ""] | None = None,
) -> LayerPlan:
    """Every missing expert is streamed, as far as slots are free. Arguments as for `plan_layer`."""
    return _plan(counts, resident, curves, max_streams, jnp.ones_like(resident))


def host_all(
    counts: Int[Array, " experts"],
    resident: Bool[Array, " experts"],
    curves: CostCurves,
    max_streams: int | Int[Array, ""] | None = None,
) -> LayerPlan:
    """Every missing expert runs on the host. Arguments as for `plan_layer`."""
    return _plan(counts, resident, curves, max_streams, jnp.zeros_like(resident))


def lp_bound(
    counts: Int[Array, " experts"], resident: Bool[Array, " experts"], curves: CostCurves
) -> Float[Array, ""]:
    """Seconds that no schedule beats with these residents, even if experts may be cut in parts.

    The linear relaxation: a part of each missing expert is streamed, the rest runs on the host,
    and the device never waits for the last transfer. For a given streamed amount the host has the
    least to do if the largest are streamed, the device if the cheapest are; both are piecewise
    linear in that amount, so the least maximum lies at a whole number or where two resources
    finish together. Plans that use only the host, or only the link, save the other's fixed cost
    and are looked at as they are. Residents run on the device.

    Args:
      counts: tokens routed to each expert.
      resident: whether an expert's weights are on the device.
      curves: costs of the layer's experts.
    """
    experts = counts.shape[0]
    counts = counts.astype(jnp.int32)
    missing = (counts > 0) & ~resident
    count = jnp.sum(missing)
    negated = jnp.sort(jnp.where(missing, -counts, 0))
    taken = negated < 0
    host = jnp.where(taken, curves.host_seconds(-negated), 0)
    device = jnp.where(taken, curves.device_seconds(-negated), jnp.inf)
    busy = jnp.where(resident & (counts > 0), curves.device_seconds(counts), 0).sum()
    rest = jnp.append(jax.lax.cumsum(-jnp.sort(-host), reverse=True), 0.0)
    work = busy + jnp.append(0.0, jax.lax.cumsum(jnp.sort(device)))
    m = jnp.arange(experts + 1, dtype=jnp.int32)
    memory = jnp.full(experts + 1, count.astype(jnp.float32) * curves.memory)

    def lines(host: jax.Array, link: jax.Array, part: slice) -> list[jax.Array]:
        parts = ResourceSeconds(
            host=host, link=link, work=work[part], waits=link, memory=memory[part]
        )
        return _lines(parts, curves)

    # Prefixes as they are. Then from one to the next: some is streamed and some is not, so that
    # both fixed costs are paid.
    link = curves.link_latency + m.astype(jnp.float32) * curves.stream
    launch = jnp.where(m < count, curves.host_launch, 0)
    ends = lines(rest + launch, jnp.where(m > 0, link, 0), slice(None))
    whole = jnp.where(m <= count, jnp.stack(ends).max(0), jnp.inf).min()
    left = lines(rest[:-1] + curves.host_launch, link[:-1], slice(None, -1))
    right = lines(rest[1:] + curves.host_launch, link[1:], slice(1, None))
    inside = jnp.float32(jnp.inf)
    for one in range(len(left)):
        for other in range(one):
            before, after = left[one] - left[other], right[one] - right[other]
            at = before / jnp.where(before == after, 1, before - after)
            meet = [a + (b - a) * at for a, b in zip(left, right, strict=True)]
            value = jnp.stack(meet).max(0)
            proper = (at >= 0) & (at <= 1) & (m[1:] <= count) & ~jnp.isnan(value)
            inside = jnp.minimum(inside, jnp.where(proper, value, jnp.inf).min(initial=jnp.inf))
    return jnp.minimum(whole, inside)


def _lines(parts: ResourceSeconds, curves: CostCurves) -> list[Float[Array, "*shape"]]:
    """What the layer's time is the maximum of."""
    link_beside, host_beside = curves.link_beside > 0, curves.host_beside > 0
    work = jnp.where(link_beside, parts.work, parts.work + parts.link)
    waits = jnp.where(link_beside, jnp.maximum(parts.waits, parts.link), work)
    return [
        jnp.where(host_beside, parts.host, parts.host + work),
        jnp.where(host_beside, work, parts.host + work),
        jnp.where(host_beside, waits, parts.host + waits),
        parts.memory,
    ]


def _plan(
    counts: Int[Array, " experts"],
    resident: Bool[Array, " experts"],
    curves: CostCurves,
    max_streams: int | Int[Array, ""] | None,
    wanted: Bool[Array, " experts"],
) -> LayerPlan:
    """The plan that streams the missing experts that are wanted, the largest if slots are few."""
    counts = counts.astype(jnp.int32)
    missing = (counts > 0) & ~resident
    chosen = missing & wanted
    if max_streams is not None:
        order = jnp.argsort(jnp.where(chosen, -counts, 0), stable=True)
        rank = jnp.zeros_like(counts).at[order].set(jnp.arange(counts.shape[0], dtype=jnp.int32))
        chosen &= rank < max_streams
    placed = jnp.where(chosen, Mode.STREAM.value, Mode.HOST.value)
    placed = jnp.where(resident, Mode.RESIDENT.value, placed)
    mode = jnp.where(counts > 0, placed, Mode.IDLE.value).astype(jnp.int32)
    predicted = resource_seconds(mode, counts, curves).layer(curves)
    bound = lp_bound(counts, resident, curves)
    return LayerPlan(
        mode=mode,
        streams=jnp.sum(chosen).astype(jnp.int32),
        predicted=predicted,
        lower_bound=jnp.minimum(bound, predicted),  # equal but for rounding, where it is tight
    )
