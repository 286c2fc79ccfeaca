"""Which experts have a place on the device, and which exchanges between two steps are worth it.

Knows neither weights nor devices: a swap is a record, whoever holds the weights carries it out.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.policies import Policy, UseHistory, policy_named

EMPTY = -1  # in a slot that was never used
RATE_HALF_LIFE = 64.0  # steps
FIRST_LIFETIME = 64.0  # steps a slot is taken to keep its expert before any was exchanged
_MOST_TOKENS = 4096  # of an expert in a step; more save no more
_LIFETIME_WEIGHT = 0.05  # of one more lifetime in their average
_CAUTION = 2.0  # standard errors of a difference between two rates


@dataclass(frozen=True, kw_only=True)
class Residency:
    """What lives on the device, and what is known about the use of all experts.

    Attributes:
      policy: what orders the experts.
      slot_expert: per layer, the expert in each slot (int64); `EMPTY`: none yet.
      slot_since: per layer, the step since which it is there.
      step: steps observed; a prompt counts as one.
      history: the policy's, over [layers, experts].
      used: whether the last step used an expert.
      uses, tokens: decayed steps in which an expert was used, and tokens it got in them.
      steps: decayed number of steps; uses / steps is the rate of use.
      lifetime: mean steps an exchanged expert had been in its slot.
    """

    policy: Policy
    slot_expert: tuple[Int[np.ndarray, " _slots"], ...]
    slot_since: tuple[Int[np.ndarray, " _slots"], ...]
    step: int
    history: UseHistory
    used: Bool[np.ndarray, "layers experts"]
    uses: Float[np.ndarray, "layers experts"]
    tokens: Float[np.ndarray, "layers experts"]
    steps: float = 0.0
    lifetime: float = FIRST_LIFETIME

    @property
    def rates(self) -> Float[np.ndarray, "layers experts"]:
        """Decayed probability that a step uses an expert."""
        return self.uses / max(self.steps, 1e-12)

    @property
    def resident(self) -> Bool[np.ndarray, "layers experts"]:
        """Whether an expert is in a slot."""
        mask = np.zeros(self.used.shape, bool)
        for layer, experts in enumerate(self.slot_expert):
            mask[layer, experts[experts != EMPTY]] = True
        return mask


@dataclass(frozen=True, kw_only=True)
class Swap:
    """One exchange: the expert `incoming` takes the slot of `outgoing` (`EMPTY`: a free slot)."""

    layer: int
    slot: int
    incoming: int
    outgoing: int


def start_residency(
    slot_expert: tuple[Int[np.ndarray, " _slots"], ...], num_experts: int, policy: str | Policy
) -> Residency:
    """A residency before the first step.

    `slot_expert` has one array per layer; a dense layer's is empty. Raises ValueError if an expert
    does not exist or has two slots.
    """
    slots = tuple(np.asarray(experts, np.int64) for experts in slot_expert)
    policy = policy_named(policy)
    shape = (len(slots), num_experts)
    residency = Residency(
        policy=policy,
        slot_expert=slots,
        slot_since=tuple(np.zeros_like(experts) for experts in slots),
        step=0,
        history=policy.start(shape),
        used=np.zeros(shape, bool),
        uses=np.zeros(shape),
        tokens=np.zeros(shape),
    )
    if found := violations(residency, num_experts):
        raise ValueError(f"no residency can start like this: {'; '.join(found)}")
    return residency


def profile_placement(
    counts: Int[np.ndarray, "layers experts"], slots: tuple[int, ...]
) -> tuple[Int[np.ndarray, " _slots"], ...]:
    """The experts with the most tokens of each layer, for `start_residency`; equal ones by id.

    Raises ValueError if slots are not one number from 0 to the experts for each layer.
    """
    layers, experts = counts.shape
    if len(slots) != layers or not all(0 <= count <= experts for count in slots):
        raise ValueError(
            f"slots {slots} do not fit {layers} layers with {experts} experts; give one number "
            "from 0 to the experts for each layer"
        )
    order = np.argsort(-counts, axis=1, kind="stable")
    return tuple(np.sort(row[:count]) for row, count in zip(order, slots, strict=True))


def observe(
    residency: Residency,
    counts: Int[np.ndarray, "layers experts"],
    gates: Float[np.ndarray, "layers experts"],
) -> Residency:
    """The residency after one more step; slots stay as they are.

    Args:
      residency: before the step.
      counts: tokens routed to each expert; zero in dense layers.
      gates: their summed router weights.

    Raises ValueError if the shapes are not those of the residency.
    """
    history = residency.policy.observe(residency.history, counts, gates)
    decay, used = 0.5 ** (1 / RATE_HALF_LIFE), counts > 0
    return replace(
        residency,
        step=residency.step + 1,
        history=history,
        used=used,
        uses=decay * residency.uses + used,
        tokens=decay * residency.tokens + counts,
        steps=decay * residency.steps + 1,
    )


def warm_start(
    residency: Residency, counts: Int[np.ndarray, "layers experts"], tokens: int
) -> Residency:
    """The residency after a prompt: rates are seeded as if its tokens had been decoded one by one.

    Args:
      residency: before the prompt.
      counts: tokens of the prompt routed to each expert.
      tokens: length of the prompt.

    Raises ValueError if the prompt is empty or the shapes are not those of the residency.
    """
    if tokens < 1:
        raise ValueError(f"a prompt of {tokens} tokens seeds nothing; give at least one token")
    if counts.shape != residency.used.shape:
        raise ValueError(
            f"counts have shape {counts.shape}, the residency has {residency.used.shape}; give "
            "every layer, with zeros in dense ones"
        )
    rates = counts / tokens
    decay = 0.5 ** (1 / RATE_HALF_LIFE)
    fade = decay**tokens
    weight = (1 - fade) / (1 - decay)
    return replace(
        residency,
        step=residency.step + 1,
        history=residency.policy.seed(residency.history, rates, tokens),
        used=counts > 0,
        uses=fade * residency.uses + weight * rates,
        tokens=fade * residency.tokens + weight * rates,
        steps=fade * residency.steps + weight,
    )


@dataclass(frozen=True, kw_only=True)
class SwapCosts:
    """What a swap costs and saves, as numbers on the host: read after every step.

    Attributes:
      saving: seconds that a hit saves over the cheaper way of a miss, by tokens; those past the
        end count as the last.
      upload: seconds of link or host memory that a swap takes.
    """

    saving: Float[np.ndarray, " tokens"]
    upload: float


def swap_costs(curves: CostCurves, overlap: bool = False) -> SwapCosts:
    """The costs of swaps, from those of experts.

    One expert comes and then another goes back, as the engine does it; with `overlap` both at once.
    """
    tokens = jnp.arange(_MOST_TOKENS + 1, dtype=jnp.int32)
    device = curves.device_seconds(tokens)
    missed = jnp.minimum(curves.host_seconds(tokens), curves.stream + device)
    return SwapCosts(
        saving=np.asarray(missed - device, np.float64),
        upload=(1 if overlap else 2) * max(float(curves.stream), float(curves.memory)),
    )


def propose_swaps(
    residency: Residency,
    costs: SwapCosts,
    most_per_step: int,
    idle_link_seconds: float | None,
    arrived: Bool[np.ndarray, "layers experts"] | None = None,
    hysteresis: float = 0.1,
) -> tuple[Swap, ...]:
    """The exchanges worth making before the next step, the most valuable first.

    Expert e replaces v if the policy values it more, it is used more often by the factor
    1 + hysteresis, and the fill pays back: (p_e - p_v) * lifetime * saving(n) > exposed. p is the
    rate of use, n the tokens e usually gets, and a hit saves the cheaper way of a miss, host or
    link, less the device's own time. Fills are exposed as far as they exceed the idle link. Where
    a fill is exposed, p_e - p_v is taken as two standard errors less than it seems: among many
    experts some always seem popular by chance, and paying for them never ends. An expert that the
    last step used is never evicted; a policy that does not move proposes nothing.

    Args:
      residency: after the last step was observed.
      costs: of swaps, see `swap_costs`.
      most_per_step: at most this many swaps.
      idle_link_seconds: what link and host memory have to spare; None: not known, all is exposed.
      arrived: experts whose weights the last step streamed: keeping one moves nothing.
      hysteresis: by what part e must be used more often than v.

    Raises ValueError if most_per_step is negative.
    """
    if most_per_step < 0:
        raise ValueError(f"most_per_step is {most_per_step}; 0 is the least, it forbids all swaps")
    widest = max((len(experts) for experts in residency.slot_expert), default=0)
    pairs = min(most_per_step, widest, residency.used.shape[1])
    if not residency.policy.moves or pairs == 0:
        return ()
    resident, value, rates = residency.resident, _values(residency), residency.rates
    slots = np.array([len(experts) for experts in residency.slot_expert])
    free = slots - resident.sum(1)
    # Per layer, the j-th best of those outside against the j-th worst inside; free slots first.
    outside = np.where(resident, -np.inf, value)
    incoming = np.argsort(-outside, axis=1, kind="stable")[:, :pairs]
    evictable = resident & ~residency.used
    worst = np.argsort(np.where(evictable, value, np.inf), axis=1, kind="stable")
    rank = np.arange(pairs)[None, :] - free[:, None]
    outgoing = np.take_along_axis(worst, np.maximum(rank, 0), axis=1)
    outgoing = np.where(rank < 0, EMPTY, outgoing)
    read = partial(np.take_along_axis, axis=1)
    valid = (rank < evictable.sum(1)[:, None]) & ~read(resident, incoming)
    valid &= (slots > 0)[:, None]
    old = np.maximum(outgoing, 0)
    old_value = np.where(outgoing == EMPTY, -np.inf, read(value, old))
    old_rate = np.where(outgoing == EMPTY, 0.0, read(rates, old))
    new_rate = read(rates, incoming)
    usual = read(residency.tokens, incoming) / np.maximum(read(residency.uses, incoming), 1e-12)
    saving = costs.saving[np.clip(np.rint(usual), 1, len(costs.saving) - 1).astype(np.int64)]
    valid &= (read(value, incoming) > old_value) & (new_rate > (1 + hysteresis) * old_rate)
    more = np.where(valid, new_rate - old_rate, 0.0)
    doubt = _CAUTION * np.sqrt(
        _variance(residency, read(residency.uses, incoming))
        + _variance(residency, np.where(outgoing == EMPTY, 0.0, read(residency.uses, old)))
    )
    worth = residency.lifetime * np.where(valid, saving, 0.0)
    gain, sure = worth * more, worth * np.maximum(0.0, more - doubt)

    at_hand = np.zeros_like(resident) if arrived is None else arrived
    left, found = idle_link_seconds or 0.0, []
    layers, columns = np.nonzero(valid)
    for index in np.argsort(-gain[layers, columns], kind="stable"):
        if len(found) == most_per_step:
            break
        layer, column = int(layers[index]), int(columns[index])
        expert = int(incoming[layer, column])
        cost = 0.0 if at_hand[layer, expert] else costs.upload
        exposed = max(0.0, cost - left)
        if not (sure if exposed > 0 else gain)[layer, column] > exposed:
            continue
        left = max(0.0, left - cost)
        found.append(_swap(residency, layer, expert, int(outgoing[layer, column]), found))
    return tuple(found)


def apply_swap(residency: Residency, swap: Swap) -> Residency:
    """The residency after the swap.

    Raises ValueError if the slot does not hold `outgoing`, or `incoming` does not exist or already
    has a slot: a swap must not be applied twice.
    """
    here = residency.slot_expert[swap.layer]
    if not 0 <= swap.slot < len(here) or here[swap.slot] != swap.outgoing:
        raise ValueError(
            f"{swap}: that slot does not hold expert {swap.outgoing}; layer {swap.layer} has "
            f"experts {here.tolist()}; propose swaps anew"
        )
    if not 0 <= swap.incoming < residency.used.shape[1] or swap.incoming in here:
        raise ValueError(
            f"{swap}: expert {swap.incoming} does not exist or has a slot already; layer "
            f"{swap.layer} has experts {here.tolist()}; propose swaps anew"
        )
    step, lifetime = residency.step, residency.lifetime
    if swap.outgoing != EMPTY:
        lived = max(1, step - int(residency.slot_since[swap.layer][swap.slot]))
        lifetime += _LIFETIME_WEIGHT * (lived - lifetime)
    return replace(
        residency,
        slot_expert=_with(residency.slot_expert, swap, swap.incoming),
        slot_since=_with(residency.slot_since, swap, step),
        lifetime=lifetime,
    )


def violations(
    residency: Residency,
    num_experts: int,
    host_expert: tuple[Int[np.ndarray, " _entries"], ...] | None = None,
) -> list[str]:
    """What is wrong: experts that do not exist, are doubled, or are lost. Empty: nothing.

    Where each expert is stored once, on one side, `host_expert` tells per layer which experts the
    host holds (none in dense layers); without it only the slots can be judged.
    """
    found = []
    for layer, experts in enumerate(residency.slot_expert):
        filled = experts[experts != EMPTY]
        on_host = np.zeros(0, np.int64) if host_expert is None else host_expert[layer]
        everywhere = np.concatenate([filled, on_host])
        for expert in sorted({int(e) for e in everywhere if not 0 <= e < num_experts}):
            found.append(f"layer {layer}: expert {expert} does not exist, there are {num_experts}")
        known = everywhere[(everywhere >= 0) & (everywhere < num_experts)]
        times = np.bincount(known, minlength=num_experts)
        found += [f"layer {layer}: expert {e} is there twice" for e in np.flatnonzero(times > 1)]
        if host_expert is not None and len(experts) + len(on_host):
            found += [f"layer {layer}: expert {e} is lost" for e in np.flatnonzero(times == 0)]
    return found


def _values(residency: Residency) -> Float[np.ndarray, "layers experts"]:
    return residency.policy.value(residency.history)


def _variance(
    residency: Residency, uses: Float[np.ndarray, "layers pairs"]
) -> Float[np.ndarray, "layers pairs"]:
    """Of the rates of these uses; two made-up steps keep it from being 0 (Agresti, Coull)."""
    steps = residency.steps + 2
    rate = (uses + 1) / steps
    return rate * (1 - rate) / steps


def _swap(residency: Residency, layer: int, incoming: int, outgoing: int, before: list) -> Swap:
    """The swap of that pair; free slots are taken in order, also by those found before."""
    taken = sum(s.layer == layer and s.outgoing == EMPTY for s in before)
    slots = np.flatnonzero(residency.slot_expert[layer] == outgoing)
    slot = int(slots[taken if outgoing == EMPTY else 0])
    return Swap(layer=layer, slot=slot, incoming=incoming, outgoing=outgoing)


def _with(arrays: tuple[np.ndarray, ...], swap: Swap, entry: int) -> tuple[np.ndarray, ...]:
    changed = arrays[swap.layer].copy()
    changed[swap.slot] = entry
    return (*arrays[: swap.layer], changed, *arrays[swap.layer + 1 :])
