"""Missing experts cut along ffn, so that the device can run a part of one and the host the rest.

Knows numbers only; `load(expert_pieces=)` makes the engine run its experts so.

An expert's output is the sum of what its pieces along ffn put out, and a piece is an expert with a
narrower ffn. So pieces are planned as experts are, in the order of their experts: item
e * count + i is piece i of expert e. The pieces of one expert have equal counts, so they follow one
another in every order of `planner.plan_layer`; streaming a prefix of one, it cuts one expert at
most. Resident experts cost as much as whole ones: on a device all of them are one grouped product,
however they are cut.
"""

from dataclasses import dataclass, field
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import LayerPlan, Mode, Planner
from moe_jax.placement.rules import ResourceSeconds, resource_seconds

_RESIDENTS = 2**23  # a count that no expert gets; float32 tells it from one less


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Pieces:
    """How missing experts are cut.

    Attributes:
      curves: costs of one piece. Fixed costs do not shrink with it, so these are not an expert's
        costs divided; `count` pieces must not cost less than an expert, lest `rules.lp_bound` of
        the experts be no bound. Launch, latency and what works beside what are an expert's.
      count: equal pieces of an expert; 1: experts are not cut.
    """

    curves: CostCurves
    count: int = field(metadata=dict(static=True))

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"experts in {self.count} pieces; 1 leaves them whole, 2 halves them")


def plan_pieces(
    planner: Planner,
    counts: Int[Array, " experts"],
    resident: Bool[Array, " experts"],
    curves: CostCurves,
    pieces: Pieces,
) -> LayerPlan:
    """The plan of a layer whose missing experts are cut; its modes and streams are of pieces.

    With one piece it is the planner's own plan. Otherwise the planner sees the pieces of missing
    experts, and one item more: a resident that takes the time of all resident experts. An expert
    that it cuts is streamed whole if that takes no longer: then it can stay.

    Args:
      planner: with the signature of `planner.plan_layer`.
      counts: tokens routed to each expert.
      resident: whether an expert's weights are on the device.
      curves: costs of a whole expert.
      pieces: how missing experts are cut.
    """
    if pieces.count == 1:
        return planner(counts, resident, curves)
    plan = planner(*_items(counts, resident, curves, pieces))
    streamed = (plan.mode[:-1] == Mode.STREAM.value).reshape(-1, pieces.count)
    kept = jnp.repeat(resident & (counts > 0), pieces.count)
    cut = jnp.where(kept, Mode.RESIDENT.value, plan.mode[:-1]).astype(jnp.int32)
    touched = jnp.repeat(streamed.any(1), pieces.count)
    whole = jnp.where(touched, Mode.STREAM.value, cut).astype(jnp.int32)

    def play(mode: Int[Array, " items"]) -> Float[Array, ""]:
        return piece_seconds(mode, counts, resident, curves, pieces).layer(curves)

    seconds = play(whole)
    as_fast = seconds <= play(cut)
    return LayerPlan(
        mode=jnp.where(as_fast, whole, cut),
        streams=jnp.where(as_fast, touched.sum(dtype=jnp.int32), plan.streams),
        predicted=jnp.where(as_fast, jnp.minimum(seconds, plan.predicted), plan.predicted),
        lower_bound=plan.lower_bound,
    )


def piece_seconds(
    mode: Int[Array, " items"],
    counts: Int[Array, " experts"],
    resident: Bool[Array, " experts"],
    curves: CostCurves,
    pieces: Pieces,
) -> ResourceSeconds:
    """Plays a plan of pieces through; `mode` as in `plan_pieces`' plans, the rest as there."""
    if pieces.count == 1:
        return resource_seconds(mode, counts, curves)
    item_counts, _, item_curves = _items(counts, resident, curves, pieces)
    mode = jnp.append(mode, Mode.RESIDENT.value)
    mode = jnp.where(item_counts > 0, mode, Mode.IDLE.value).astype(jnp.int32)
    return resource_seconds(mode, item_counts, item_curves)


def _items(
    counts: Array, resident: Array, curves: CostCurves, pieces: Pieces
) -> tuple[Array, Array, CostCurves]:
    """What a planner sees: pieces of missing experts, then one resident in place of all others.

    Residents are as whole as they are, but a planner knows one curve for the device. So their time
    together is a knot of it, at a number of tokens that only that item has.
    """
    counts = counts.astype(jnp.int32)
    busy = jnp.where(resident & (counts > 0), curves.device_seconds(counts), 0).sum()
    whole, cut = jnp.int32(_RESIDENTS), pieces.curves
    last = whole - 1  # up to here the last slope goes on
    knots = jnp.stack([last, whole]).astype(jnp.float32)
    host = jnp.stack([cut.host_seconds(last), cut.host_seconds(last)])
    device = jnp.stack([cut.device_seconds(last), busy])
    item_counts = jnp.repeat(jnp.where(resident, 0, counts), pieces.count)
    return (
        jnp.append(item_counts, whole),
        jnp.append(jnp.zeros(item_counts.shape, bool), True),
        CostCurves(
            tokens=jnp.append(cut.tokens, knots),
            host=jnp.append(cut.host, host),
            device=jnp.append(cut.device, device),
            stream=cut.stream,
            host_launch=cut.host_launch,
            link_latency=cut.link_latency,
            memory=cut.memory,
            host_beside=cut.host_beside,
            link_beside=cut.link_beside,
        ),
    )
