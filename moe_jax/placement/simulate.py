"""Replays routing traces through planners, policies and cost curves, against what hindsight allows.

Nothing runs but arithmetic. An event, one layer of one step, is atomic: all its experts meet the
residency as it was before the step, and exchanges come after it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.pieces import Pieces, piece_seconds, plan_pieces
from moe_jax.placement.planner import Mode, Planner, plan_layer
from moe_jax.placement.policies import Policy, policy_named
from moe_jax.placement.residency import (
    Residency,
    apply_swap,
    observe,
    propose_swaps,
    start_residency,
    swap_costs,
    warm_start,
)
from moe_jax.placement.rules import lp_bound
from moe_jax.placement.trace import RoutingTrace


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What a replay took; seconds of the experts only, summed over layers.

    Attributes:
      prefill: which steps were prompts.
      seconds: of each step, float64; uploads that did not fit beside it included.
      bounds: what no schedule beats with the residents that a step had; uploads are free.
      exposed_seconds: of `seconds`, those of uploads.
      oracle: what was compared with; None: nothing.
      hit_rate: activations whose expert was resident, a part of all.
      streamed_bytes: weights streamed for one call.
      uploaded_bytes: weights brought to stay.
      swaps: experts exchanged; those that had been streamed anyway cost no bytes.
    """

    prefill: Bool[np.ndarray, " steps"]
    seconds: Float[np.ndarray, " steps"]
    bounds: Float[np.ndarray, " steps"]
    exposed_seconds: float
    oracle: "Oracle | None"
    hit_rate: float
    streamed_bytes: int
    uploaded_bytes: int
    swaps: int

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "decode ms",
        "bound",
        "/ bound",
        "/ oracle",
        "prefill ms",
        "/ bound",
        "hits",
        "Belady",
        "streamed MB",
        "uploaded MB",
        "exposed ms",
    )

    @property
    def total_seconds(self) -> float:
        """Seconds of all steps."""
        return float(self.seconds.sum())

    def record(self) -> dict[str, float | int | None]:
        """Plain numbers for a file: times in seconds per step, NaN-free."""
        decode, prefill = ~self.prefill, self.prefill
        return {
            "decode_steps": int(decode.sum()),
            "decode_seconds": _mean(self.seconds, decode),
            "decode_bound_seconds": _mean(self.bounds, decode),
            "decode_oracle_seconds": _mean(self.oracle.seconds, decode) if self.oracle else None,
            "prefill_steps": int(prefill.sum()),
            "prefill_seconds": _mean(self.seconds, prefill),
            "prefill_bound_seconds": _mean(self.bounds, prefill),
            "hit_rate": self.hit_rate,
            "oracle_hit_rate": self.oracle.hit_rate if self.oracle else None,
            "streamed_bytes_per_step": self.streamed_bytes / max(1, len(self.seconds)),
            "uploaded_bytes_per_step": self.uploaded_bytes / max(1, len(self.seconds)),
            "exposed_seconds_per_step": self.exposed_seconds / max(1, len(self.seconds)),
            "swaps": self.swaps,
        }

    def __str__(self) -> str:
        """A row of a Markdown table under `COLUMNS`; bytes and exposed times are per step."""
        row = self.record()
        decode, prefill = row["decode_seconds"], row["prefill_seconds"]
        cells = (
            _text(decode, 1e3, ".2f"),
            _text(row["decode_bound_seconds"], 1e3, ".2f"),
            _text(_ratio(decode, row["decode_bound_seconds"]), 1.0, ".3f"),
            _text(_ratio(decode, row["decode_oracle_seconds"]), 1.0, ".3f"),
            _text(prefill, 1e3, ".0f"),
            _text(_ratio(prefill, row["prefill_bound_seconds"]), 1.0, ".3f"),
            _text(self.hit_rate, 100.0, ".1f", "%"),
            _text(row["oracle_hit_rate"], 100.0, ".1f", "%"),
            _text(row["streamed_bytes_per_step"], 1e-6, ".0f"),
            _text(row["uploaded_bytes_per_step"], 1e-6, ".0f"),
            _text(row["exposed_seconds_per_step"], 1e3, ".2f"),
        )
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """What hindsight allows with that many slots.

    Belady's residents have the most hits, and every hit counts alike: where misses cost little
    beside the resident experts, or differ much in tokens, other residents may take less time.

    Attributes:
      resident: Belady's residents before each step.
      hit_rate: the part of activations that meets them.
      seconds: least seconds of each step with these residents; uploads are free.
    """

    resident: Bool[np.ndarray, "steps layers experts"]
    hit_rate: float
    seconds: Float[np.ndarray, " steps"]


def simulate(
    trace: RoutingTrace,
    curves: CostCurves,
    slots: tuple[int, ...],
    *,
    policy: str | Policy = "lfru",
    planner: Planner = plan_layer,
    pieces: Pieces | None = None,
    expert_bytes: int = 0,
    most_per_step: int = 8,
    initial: tuple[Int[np.ndarray, " _slots"], ...] | None = None,
    oracle: Oracle | None = None,
) -> Simulation:
    """Replays a trace as an engine would live through it.

    Each step is planned with the residents it starts with. Then it is observed (a prompt seeds the
    rates), and swaps that pay back are made: an expert that was just streamed as a whole stays for
    free, any other is uploaded while the link idles, and what does not fit there is added.

    Args:
      trace: what the routers did.
      curves: costs of an expert.
      slots: places on the device, for each layer of the trace.
      policy: what orders the experts, by name or itself.
      planner: with the signature of `planner.plan_layer`.
      pieces: how missing experts are cut; None: not at all.
      expert_bytes: of one expert, for the bytes reported.
      most_per_step: at most so many swaps after each step.
      initial: experts in each layer's slots at the start; None: the first ones.
      oracle: what to compare with; None: nothing.

    Raises ValueError if slots do not fit the trace, or a policy is unknown.
    """
    slots = _checked(trace, slots)
    if initial is None:
        initial = tuple(np.arange(count) for count in slots)
    residency = start_residency(initial, trace.experts, policy)
    counts = trace.counts.astype(np.int32)
    pieces = Pieces(count=1, curves=curves) if pieces is None else pieces
    if residency.policy.moves and most_per_step > 0:
        play = lambda *layers: _player(planner)(*layers, curves, pieces)
        played = _replay(trace, counts, residency, play, swap_costs(curves), most_per_step)
    else:
        fixed = np.broadcast_to(residency.resident, counts.shape)
        seconds, _, streamed = _over_steps(planner)(counts, fixed, curves, pieces)
        played = _Played(
            resident=fixed,
            seconds=np.asarray(seconds, np.float64).sum(1),
            exposed=np.zeros(trace.steps),
            streamed=float(np.asarray(streamed, np.float64).sum()),
        )
    return Simulation(
        prefill=trace.prefill,
        seconds=played.seconds + played.exposed,
        bounds=_step_bounds(counts, played.resident, curves),
        exposed_seconds=float(played.exposed.sum()),
        oracle=oracle,
        hit_rate=_hit_rate(counts, played.resident),
        streamed_bytes=round(played.streamed * expert_bytes),
        uploaded_bytes=played.uploads * expert_bytes,
        swaps=played.swaps,
    )


def find_oracle(trace: RoutingTrace, curves: CostCurves, slots: tuple[int, ...]) -> Oracle:
    """Belady's residents with the best conceivable schedule of every layer.

    Raises ValueError if slots do not fit the trace.
    """
    counts = trace.counts.astype(np.int32)
    resident = belady(trace, slots)
    return Oracle(
        resident=resident,
        hit_rate=_hit_rate(counts, resident),
        seconds=_step_bounds(counts, resident, curves),
    )


def belady(trace: RoutingTrace, slots: tuple[int, ...]) -> Bool[np.ndarray, "steps layers experts"]:
    """The residents before each step with the most hits, knowing the future.

    What is used next soonest stays (Belady 1966); a missed expert may be passed over, nothing else
    may enter, and the first residents are free to choose. Keeping an expert until its next use is
    an interval, so this picks the most intervals of which at most `slots` overlap: greedy, latest
    end dropped first, is optimal, whatever the order within an event.

    Raises ValueError if slots do not fit the trace.
    """
    limit = np.array(_checked(trace, slots))[:, None]
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
    limit = np.array(_checked(trace, slots))[:, None]
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
    return _hit_rate(trace.counts, resident)


def uniform_slots(total: int, layers: int, experts: int) -> tuple[int, ...]:
    """Slots per layer: evenly, the first layers one more; never more than there are experts."""
    even, extra = divmod(min(total, layers * experts), max(1, layers))
    return tuple(even + (layer < extra) for layer in range(layers))


@dataclass
class _Played:
    """What a replay adds up while it goes on; arrays have one entry per step."""

    resident: np.ndarray
    seconds: np.ndarray
    exposed: np.ndarray
    streamed: float = 0.0  # experts, in parts too
    swaps: int = 0
    uploads: int = 0


def _replay(trace, counts, residency: Residency, play, costs, most_per_step: int) -> _Played:
    """Step after step: what one does decides what the next one starts with."""
    nothing = np.zeros(trace.steps)
    played = _Played(np.empty(counts.shape, bool), nothing, nothing.copy())
    for step in range(trace.steps):
        resident = played.resident[step] = residency.resident
        seconds, idle, streamed = map(np.asarray, play(counts[step], resident))
        if trace.prefill[step]:
            residency = warm_start(residency, counts[step], int(trace.tokens[step]))
        else:
            residency = observe(residency, counts[step], trace.gates[step].astype(np.float64))
        spare = float(idle.sum(dtype=np.float64))
        arrived = streamed == 1
        swaps = propose_swaps(residency, costs, most_per_step, spare, arrived)
        for swap in swaps:
            residency = apply_swap(residency, swap)
        uploads = sum(not arrived[swap.layer, swap.incoming] for swap in swaps)
        played.seconds[step] = seconds.sum(dtype=np.float64)
        played.exposed[step] = max(0.0, uploads * costs.upload - spare) if uploads else 0.0
        played.streamed += float(streamed.sum(dtype=np.float64))
        played.swaps += len(swaps)
        played.uploads += uploads
    return played


@lru_cache(maxsize=32)
def _player(planner: Planner):
    """(counts, resident, curves, pieces) of all layers -> seconds, idle link, streamed parts."""

    def play(
        counts: Int[Array, " experts"],
        resident: Bool[Array, " experts"],
        curves: CostCurves,
        pieces: Pieces,
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, " experts"]]:
        mode = plan_pieces(planner, counts, resident, curves, pieces).mode
        parts = piece_seconds(mode, counts, resident, curves, pieces)
        seconds = parts.layer(curves)
        # An upload needs both the link and the host's memory.
        idle = jnp.maximum(0.0, seconds - jnp.maximum(parts.link, parts.memory))
        streamed = (mode.reshape(-1, pieces.count) == Mode.STREAM).mean(1, dtype=jnp.float32)
        return seconds, idle, streamed

    return jax.jit(jax.vmap(play, in_axes=(0, 0, None, None)))


@lru_cache(maxsize=32)
def _over_steps(planner: Planner):
    """`_player` over [steps, layers, experts], one step after another to save memory."""
    play = _player(planner)
    each = lambda counts, resident, *costs: jax.lax.map(
        lambda step: play(*step, *costs), (counts, resident)
    )
    return jax.jit(each)


def _step_bounds(counts: np.ndarray, resident: np.ndarray, curves: CostCurves) -> np.ndarray:
    return np.asarray(_bounds(counts, resident, curves), np.float64).sum(1)


@jax.jit
def _bounds(
    counts: Int[Array, "steps layers experts"],
    resident: Bool[Array, "steps layers experts"],
    curves: CostCurves,
) -> Float[Array, "steps layers"]:
    layers = jax.vmap(lp_bound, in_axes=(0, 0, None))
    return jax.lax.map(lambda x: layers(x[0], x[1], curves), (counts, resident))


def _checked(trace: RoutingTrace, slots: tuple[int, ...]) -> tuple[int, ...]:
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


def _hit_rate(counts: np.ndarray, resident: np.ndarray) -> float:
    used = counts > 0
    return float((used & resident).sum() / used.sum()) if used.any() else 1.0


def _mean(values: np.ndarray, where: np.ndarray) -> float | None:
    return float(values[where].mean()) if where.any() else None


def _ratio(value: float | None, bound: float | None) -> float | None:
    if value is None or bound is None:
        return None
    return value / bound if bound > 0 else (1.0 if value == 0 else float("inf"))


def _text(value: float | None, unit: float, form: str, sign: str = "") -> str:
    return "-" if value is None else f"{value * unit:{form}}{sign}"
