"""Which experts caches would hold: plain ones, and the one that knows the future.

A cache is judged by its hits alone. An event, one layer of one step, is atomic, as in `simulate`.
"""

import numpy as np
from jaxtyping import Bool

from moe_jax.placement.policies import Policy, policy_named
from moe_jax.placement.trace import RoutingTrace


def belady(trace: RoutingTrace, slots: tuple[int, ...]) -> Bool[np.ndarray, "steps layers experts"]:
    """The residents before each step with the most hits, knowing the future.

    What is used next soonest stays (Belady 1966); a missed expert may be passed over, nothing else
    may enter, and the first residents are free to choose. Keeping an expert until its next use is
    an interval, so this picks the most intervals of which at most `slots` overlap: greedy, latest
    end dropped first, is optimal, whatever the order within an event.

    Raises ValueError if slots do not fit the trace.
    """
    limit = np.array(checked_slots(trace, slots))[:, None]
    used = trace.counts > 0
    steps, layers, experts = used.shape
    ahead = np.full((layers, experts), np.inf)
    next_use = np.empty((steps + 1, layers, experts))
    next_use[steps] = np.inf
    for step in reversed(range(steps)):
        ahead = np.where(used[step], step, ahead)
        next_use[step] = ahead
    resident = np.empty(used.shape, bool)
    eligible = np.ones((layers, experts), bool)
    for step in range(steps):
        soonest = np.where(eligible, next_use[step], np.inf)
        # Ties fall to those already inside, and then to low ids: no needless exchange.
        outside = ~resident[step - 1] if step else np.zeros_like(eligible)
        resident[step] = _ranks(outside, soonest) < limit
        resident[step] &= eligible
        eligible = resident[step] | used[step]
    return resident


def cache_residents(
    trace: RoutingTrace, slots: tuple[int, ...], policy: str | Policy
) -> Bool[np.ndarray, "steps layers experts"]:
    """The residents before each step of a plain cache: every miss may enter, uploads cost nothing.

    After a step the policy's most valuable of residents and missed experts stay; the step's hits
    stay whatever their value. The first experts are resident at the start.

    Raises ValueError if slots do not fit the trace, or a policy is unknown.
    """
    limit = np.array(checked_slots(trace, slots))[:, None]
    policy = policy_named(policy)
    state = policy.start((trace.layers, trace.experts))
    resident = np.empty(trace.counts.shape, bool)
    now = np.broadcast_to(np.arange(trace.experts) < limit, resident.shape[1:])
    for step in range(trace.steps):
        resident[step] = now
        counts = trace.counts[step].astype(np.int64)
        if trace.prefill[step]:
            state = policy.seed(state, counts / trace.tokens[step], int(trace.tokens[step]))
        else:
            state = policy.observe(state, counts, trace.gates[step].astype(np.float64))
        if policy.moves:
            used = counts > 0
            hit, eligible = now & used, now | used
            rank = _ranks(~now, -policy.value(state), ~hit, ~eligible)
            now = (rank < limit) & eligible
    return resident


def hit_rate(trace: RoutingTrace, resident: Bool[np.ndarray, "steps layers experts"]) -> float:
    """The part of activations (a step's experts with tokens) that are resident; none: 1."""
    used = trace.counts > 0
    return float((used & resident).sum() / used.sum()) if used.any() else 1.0


def checked_slots(trace: RoutingTrace, slots: tuple[int, ...]) -> tuple[int, ...]:
    """These slots; ValueError if there is not one number from 0 to the experts for each layer."""
    if len(slots) != trace.layers or not all(0 <= count <= trace.experts for count in slots):
        raise ValueError(
            f"slots {slots} do not fit a trace of {trace.layers} layers with {trace.experts} "
            "experts; give one number from 0 to the experts for each layer"
        )
    return slots


def _ranks(*keys: np.ndarray) -> np.ndarray:
    """The place of each expert in its layer: by the last key, ties by those before it, then id."""
    order = np.lexsort(keys, axis=-1)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[-1])[None], axis=-1)
    return ranks
