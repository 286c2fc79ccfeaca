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
bytes. Where the device curve is not flat, a prefix of another order may be better: the best ones
by host / (stream + device) and host / device, and what Fiddler's rule chooses, are played through
too, and one of them is taken if it is faster. So, but for rounding, no rule of `rules.py` is ever
faster than the plan, whatever the curves. If host, link and device all work one after the other,
the first of these orders is exact for any curves unless `max_streams` binds, but for ratios that
differ by less than their keys can tell.
`LayerPlan.lower_bound` tells how far from the optimum the plan can be at most.
"""

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, no_type_check

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
    counts = counts.astype(jnp.int32)
    missing = (counts > 0) & ~resident
    # Falling counts, equal ones by id; experts that are not missing come last, as zeros.
    by_count, n = _falling_counts(jnp.where(missing, counts, 0))
    taken = n > 0
    work = _Work(
        count=missing.sum().astype(jnp.float32),
        host=jnp.where(taken, curves.host_seconds(n), 0),
        device=jnp.where(taken, curves.device_seconds(n), 0),
        busy=jnp.where(resident & (counts > 0), curves.device_seconds(counts), 0).sum(),
        curves=curves,
    )
    most = work.count if max_streams is None else jnp.asarray(max_streams, jnp.float32)
    prefixes, lower_bound = _best_prefixes(work, taken, jnp.minimum(work.count, most))
    fiddlers = taken & fiddler_streams(n, work.device, curves)
    if max_streams is not None:
        fiddlers &= jax.lax.cumsum(fiddlers.astype(jnp.int32)) <= max_streams
    ways = jnp.concatenate([prefixes, fiddlers[None]])
    seconds = jax.vmap(functools.partial(_play, work))(ways)
    best = jnp.argmin(seconds)

    streamed = jnp.zeros_like(missing).at[by_count].set(ways[best], unique_indices=True)
    placed = jnp.where(streamed, Mode.STREAM.value, Mode.HOST.value)
    placed = jnp.where(resident, Mode.RESIDENT.value, placed)
    return LayerPlan(
        mode=jnp.where(counts > 0, placed, Mode.IDLE.value).astype(jnp.int32),
        streams=streamed.sum(dtype=jnp.int32),
        predicted=seconds[best],
        # Equal but for rounding, where it is tight.
        lower_bound=jnp.minimum(lower_bound, seconds[best]),
    )


def fiddler_streams(
    n: Int[Array, " experts"], device: Float[Array, " experts"], curves: CostCurves
) -> Bool[Array, " experts"]:
    """Whether Fiddler's rule streams a missing expert, looking at it alone.

    The host is taken to need so and so much per token, from its time for one token; streaming and
    computing on the device is taken as it is. Equal: host.

    Args:
      n: tokens of each expert.
      device: seconds of each on the device.
      curves: costs of the layer's experts.
    """
    per_token = curves.host_seconds(jnp.ones((), jnp.int32))
    return n.astype(jnp.float32) * per_token > curves.link_latency + curves.stream + device


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


class _Work(NamedTuple):
    """What there is to do in a layer; its experts in the order of falling counts."""

    count: Float[Array, ""]  # missing experts
    host: Float[Array, " experts"]  # seconds of each missing one, 0 for others
    device: Float[Array, " experts"]
    busy: Float[Array, ""]  # the device's seconds for residents
    curves: CostCurves


def _best_prefixes(
    work: _Work, taken: Bool[Array, " experts"], most: Float[Array, ""]
) -> tuple[Bool[Array, "orders experts"], Float[Array, ""]]:
    """The experts streamed by the best prefix of each order; seconds that no split beats."""
    host, device, curves = work.host, work.device, work.curves
    host_first = _falling(host / (curves.stream + device)), _falling(host / device)
    keys = jnp.where(taken[None], jnp.stack([*host_first, _bits(device)]), _INFINITE)
    keys = jnp.stack([_with_ids(keys[0]), _with_ids(keys[1]), keys[2]])
    ranked = _sort(keys)
    first, second = _ids(ranked[:2])
    shortest = jax.lax.bitcast_convert_type(ranked[2], jnp.float32)

    # Rows: by count, by the two ratios, the bound. For any S of m experts, the host cannot have
    # less to do than without the m largest, and the device has at least the m shortest to do. The
    # host's rest is summed from the end: as a difference of running sums it would be NaN for
    # infinite costs.
    devices = jnp.stack([device, device[first], device[second], shortest])
    hosts = jnp.stack([host, host[first], host[second], host])
    sums = jax.lax.cumsum(jnp.concatenate([devices, hosts[:, ::-1]]), axis=1)
    sums = jnp.pad(sums, ((0, 0), (1, 0)))
    done, rest = sums[:4], sums[4:, ::-1]
    # Candidate m streams the first m, m = 0 .. experts. By count, the device works without a pause
    # from the arrival of some j-th expert to the end. In any order it runs one after the last
    # arrival; more than that is not worth knowing to choose among the prefixes by ratio.
    m = jnp.arange(host.size + 1, dtype=jnp.float32)
    arrival = curves.link_latency + m * curves.stream
    in_turn = done[0, 1:] + jax.lax.cummax(arrival[1:] - done[0, :-1])
    one_after = arrival + shortest[0]
    link = jnp.stack([jnp.append(0.0, in_turn), one_after, one_after, one_after])
    seconds = jax.vmap(functools.partial(_together, work, m))(rest, done, link)
    seconds = jnp.where((m <= most)[None], seconds, jnp.inf)

    best = jnp.argmin(seconds[:3], axis=1, keepdims=True)
    last = jnp.take_along_axis(ranked[:2], jnp.maximum(best[1:] - 1, 0), axis=1)
    by_ratio = (keys[:2] <= last) & (best[1:] > 0)
    by_count = jnp.arange(host.size) < best[0]
    return jnp.concatenate([by_count[None], by_ratio]), seconds[3].min()


def _play(work: _Work, streamed: Bool[Array, " experts"]) -> Float[Array, ""]:
    """Seconds of the layer if these experts are streamed, the one with most tokens first."""
    device, host = jnp.where(streamed, work.device, 0), jnp.where(streamed, 0, work.host)
    sums = jnp.stack([streamed.astype(jnp.float32), device, host])
    place, done, rest = jax.lax.cumsum(sums, axis=1)
    arrival = work.curves.link_latency + place * work.curves.stream
    tails = done[-1] + arrival - jnp.append(0.0, done[:-1])
    link = jnp.where(streamed, tails, -jnp.inf).max()
    return _together(work, place[-1], rest[-1], done[-1], link)


def _together(
    work: _Work,
    streams: Float[Array, "*shape"],
    host: Float[Array, "*shape"],
    device: Float[Array, "*shape"],
    link: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """Seconds until all are done.

    Args:
      work: what there is to do.
      streams: how many experts are streamed.
      host: seconds of the experts that are not.
      device: seconds of those that are.
      link: when these have run, each not before it has arrived; of no use if there are none.
    """
    curves = work.curves
    on_host = host + jnp.where(streams < work.count, curves.host_launch, 0)
    on_device = work.busy + device
    arrived = jnp.where(streams > 0, curves.link_latency + streams * curves.stream, 0)
    beside = jnp.where(streams > 0, jnp.maximum(on_device, link), on_device)
    on_device = jnp.where(curves.link_beside > 0, beside, on_device + arrived)
    beside = jnp.maximum(on_host, on_device)
    total = jnp.where(curves.host_beside > 0, beside, on_host + on_device)
    return jnp.maximum(total, work.count * curves.memory)


_INFINITE = 0x7F800000  # the bits of a float32


# On a CPU, XLA sorts whole numbers some ten times as fast as anything else. So ids are put into the
# lower bits of keys; keys that agree in the upper ones count as equal and go by id.


def _id_bits(experts: int) -> int:
    return (experts - 1).bit_length()


def _with_ids(keys: Int[Array, " experts"]) -> Int[Array, " experts"]:
    bits = _id_bits(keys.size)
    return keys >> bits << bits | jnp.arange(keys.size, dtype=jnp.int32)


def _ids(keys: Int[Array, "*orders experts"]) -> Int[Array, "*orders experts"]:
    return keys & (2 ** _id_bits(keys.shape[-1]) - 1)


def _sort(keys: Int[Array, "*orders experts"]) -> Int[Array, "*orders experts"]:
    return jax.lax.sort(keys, is_stable=False)  # no two are equal, or it makes no odds


def _falling_counts(
    n: Int[Array, " experts"],
) -> tuple[Int[Array, " experts"], Int[Array, " experts"]]:
    """Ids in the order of falling counts, equal ones by id; the counts in that order.

    Counts past what an int32 holds above the ids, a million and more, count as equal.
    """
    bits = _id_bits(n.size)
    most = 2 ** (31 - bits) - 1
    ids = _ids(_sort(_with_ids(most - jnp.minimum(n, most) << bits)))
    return ids, n[ids]


def _bits(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Whole numbers in the order of these floats, which are not negative."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _falling(ratio: Float[Array, " experts"]) -> Int[Array, " experts"]:
    """Keys, the least for the largest ratio."""
    ratio = jnp.where(ratio > 0, ratio, 0)  # 0 / 0 is 0 here
    return _INFINITE - _bits(ratio)
