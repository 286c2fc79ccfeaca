"""Planners that are made to run all missing experts in one way, and planners that users bring.

A forced planner is given costs under which the other way never pays, so that its predictions hold,
and is overruled where it chooses that way all the same.
"""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import LayerPlan, Mode, Planner, plan_layer
from moe_jax.placement.rules import resource_seconds

MissingExperts = Literal["auto", "stream", "host"]


def force_planner(planner: Planner, missing_experts: MissingExperts) -> Planner:
    """A planner that streams, or hosts, every expert that is not resident; "auto": as it is."""
    if missing_experts == "auto":
        return planner
    wanted, other = {
        "stream": (Mode.STREAM, Mode.HOST),
        "host": (Mode.HOST, Mode.STREAM),
    }[missing_experts]

    def forced(
        counts: Int[Array, " experts"], resident: Bool[Array, " experts"], curves: CostCurves
    ) -> LayerPlan:
        plan = planner(counts, resident, force(curves, missing_experts))
        if planner is plan_layer:  # it never chooses what would never end
            return plan
        mode = jnp.where(plan.mode == other.value, wanted.value, plan.mode)
        predicted = resource_seconds(mode, counts, curves).layer(curves)
        return LayerPlan(
            mode=mode,
            streams=jnp.sum(mode == Mode.STREAM.value, dtype=jnp.int32),
            predicted=predicted,
            lower_bound=jnp.minimum(plan.lower_bound, predicted),
        )

    return forced


def force(curves: CostCurves, missing_experts: MissingExperts) -> CostCurves:
    """Curves under which a planner streams, or hosts, every expert that is not resident."""
    never = lambda curve: jnp.full_like(curve, np.inf)
    match missing_experts:
        case "auto":
            return curves
        case "stream":
            return replace(curves, host=never(curves.host))
        case "host":
            return replace(curves, stream=never(curves.stream))


def streaming_can_pay(curves: CostCurves) -> bool:
    """Whether it can ever be faster to stream a missing expert than to run it on the host.

    Where link or host work beside the device, that depends on the step. Where all is done one after
    the other, as on the CPU backend, the costs of a single expert tell.
    """
    if curves.host_beside or curves.link_beside:
        return True
    hosted = curves.host_launch + curves.host
    return bool((curves.stream + curves.device < hosted).any())


def check_planner(planner: Any, experts: int, curves: CostCurves) -> None:
    """Tries a planner on a layer in which every second expert is resident and each has a token.

    Raises ValueError if it cannot be traced, or does not return a plan of such a layer.
    """
    counts, resident = jnp.ones(experts, jnp.int32), jnp.arange(experts) % 2 == 0
    must = "planner must be a function like moe_jax.placement.planner.plan_layer that jax can trace"
    try:
        plan = jax.jit(planner)(counts, resident, curves)
    except Exception as error:
        raise ValueError(
            f"{must}; called with counts, resident and curves, {planner!r} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(plan, LayerPlan):
        raise ValueError(f"{must} and returns a LayerPlan; {planner!r} returned {plan!r}")
    mode = np.asarray(plan.mode)
    if mode.shape != (experts,) or not np.isin(mode, list(Mode)).all():
        raise ValueError(
            f"{must}; its modes must be one Mode (0 to {max(Mode)}) for each of {experts} experts, "
            f"and {planner!r} returned {mode!r}"
        )
