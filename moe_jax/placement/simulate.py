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

from moe_jax.placement.caches import belady, checked_slots, hit_rate
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.pieces import Pieces, piece_seconds, plan_pieces
from moe_jax.placement.planner import Mode, Planner, plan_layer
from moe_jax.placement.policies import Policy
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
      exposed: of `seconds`, those of uploads that no step hid.
      oracle: what was compared with; None: nothing.
      hit_rate: activations whose expert was resident, a part of all.
      streamed_bytes: weights streamed for one call.
      uploaded_bytes: weights brought to stay.
      swaps: experts exchanged; those that had been streamed anyway cost no bytes.
    """

    prefill: Bool[np.ndarray, " steps"]
    seconds: Float[np.ndarray, " steps"]
    bounds: Float[np.ndarray, " steps"]
    exposed: Float[np.ndarray, " steps"]
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

    @property
    def exposed_seconds(self) -> float:
        """Seconds of uploads that no step hid."""
        return float(self.exposed.sum())

    def over_bound(self, phase: Bool[np.ndarray, " steps"]) -> float | None:
        """How often their bound some steps take, uploads left out; None: there is no such step."""
        return _ratio(_mean(self.seconds - self.exposed, phase), _mean(self.bounds, phase))

    def record(self) -> dict[str, float | int | None]:
        """Plain numbers for a file: times in seconds per step, NaN-free."""
        decode, prefill = ~self.prefill, self.prefill
        return {
            "decode_steps": int(decode.sum()),
            "decode_seconds": _mean(self.seconds, decode),
            "decode_bound_seconds": _mean(self.bounds, decode),
            "decode_over_bound": self.over_bound(decode),
            "decode_oracle_seconds": _mean(self.oracle.seconds, decode) if self.oracle else None,
            "prefill_steps": int(prefill.sum()),
            "prefill_seconds": _mean(self.seconds, prefill),
            "prefill_bound_seconds": _mean(self.bounds, prefill),
            "prefill_over_bound": self.over_bound(prefill),
            "hit_rate": self.hit_rate,
            "oracle_hit_rate": self.oracle.hit_rate if self.oracle else None,
            "streamed_bytes_per_step": self.streamed_bytes / max(1, len(self.seconds)),
            "uploaded_bytes_per_step": self.uploaded_bytes / max(1, len(self.seconds)),
            "exposed_seconds_per_step": self.exposed_seconds / max(1, len(self.seconds)),
            "swaps": self.swaps,
        }

    def __str__(self) -> str:
        """A row of a Markdown table under `COLUMNS`; bytes and exposed times are per step.

        Times are with uploads; over the bound, whose residents are given, they are without.
        """
        row = self.record()
        decode, prefill = row["decode_seconds"], row["prefill_seconds"]
        cells = (
            _text(decode, 1e3, ".2f"),
            _text(row["decode_bound_seconds"], 1e3, ".2f"),
            _text(row["decode_over_bound"], 1.0, ".3f"),
            _text(_ratio(decode, row["decode_oracle_seconds"]), 1.0, ".3f"),
            _text(prefill, 1e3, ".0f"),
            _text(row["prefill_over_bound"], 1.0, ".3f"),
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
    overlap_uploads: bool = False,
    initial: tuple[Int[np.ndarray, " _slots"], ...] | None = None,
    oracle: Oracle | None = None,
) -> Simulation:
    """Replays a trace as an engine would live through it.

    Each step is planned with the residents it starts with. Then it is observed (a prompt seeds the
    rates), and swaps that pay back are made between the steps, as the engine makes them. With
    `overlap_uploads` they are made as an executor could that does more: an expert that was just
    streamed as a whole stays for free, any other is uploaded while the link idles, and what does
    not fit there is added.

    Args:
      trace: what the routers did.
      curves: costs of an expert.
      slots: places on the device, for each layer of the trace.
      policy: what orders the experts, by name or itself.
      planner: with the signature of `planner.plan_layer`.
      pieces: how missing experts are cut; None: not at all.
      expert_bytes: of one expert, for the bytes reported.
      most_per_step: at most so many swaps after each step.
      overlap_uploads: whether uploads run beside steps.
      initial: experts in each layer's slots at the start; None: the first ones.
      oracle: what to compare with; None: nothing.

    Raises ValueError if slots do not fit the trace, or a policy is unknown.
    """
    slots = checked_slots(trace, slots)
    if initial is None:
        initial = tuple(np.arange(count) for count in slots)
    residency = start_residency(initial, trace.experts, policy)
    counts = trace.counts.astype(np.int32)
    pieces = Pieces(count=1, curves=curves) if pieces is None else pieces
    if residency.policy.moves and most_per_step > 0:
        play = lambda *layers: _player(planner)(*layers, curves, pieces)
        costs = swap_costs(curves, overlap_uploads)
        played = _replay(trace, counts, residency, play, costs, most_per_step, overlap_uploads)
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
        exposed=played.exposed,
        oracle=oracle,
        hit_rate=hit_rate(trace, played.resident),
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
        hit_rate=hit_rate(trace, resident),
        seconds=_step_bounds(counts, resident, curves),
    )


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


def _replay(
    trace, counts, residency: Residency, play, costs, most_per_step: int, overlap: bool
) -> _Played:
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
        spare = float(idle.sum(dtype=np.float64)) if overlap else 0.0
        arrived = (streamed == 1) & overlap
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


def _mean(values: np.ndarray, where: np.ndarray) -> float | None:
    return float(values[where].mean()) if where.any() else None


def _ratio(value: float | None, bound: float | None) -> float | None:
    if value is None or bound is None:
        return None
    return value / bound if bound > 0 else (1.0 if value == 0 else float("inf"))


def _text(value: float | None, unit: float, form: str, sign: str = "") -> str:
    return "-" if value is None else f"{value * unit:{form}}{sign}"
