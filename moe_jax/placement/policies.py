"""Which experts are worth a place on the device: policies over the history of their use.

Knows neither slots nor costs: a policy orders experts, `residency` decides what is moved.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int, Num


@dataclass(frozen=True, kw_only=True)
class UseHistory:
    """How experts were used so far; all arrays float64, any leading axes (layers), then experts.

    Attributes:
      step: steps observed.
      last_use: the step in which an expert was last used; 0: never.
      uses: steps in which it was used, the older ones counting less (the policy's half-life).
      interval: steps that usually pass between two uses, an average that halves the past.
      gate: the router's share of it, averaged over steps (the policy's weight of the newest).
    """

    step: int
    last_use: Float[np.ndarray, "*layers experts"]
    uses: Float[np.ndarray, "*layers experts"]
    interval: Float[np.ndarray, "*layers experts"]
    gate: Float[np.ndarray, "*layers experts"]

    @property
    def age(self) -> Float[np.ndarray, "*layers experts"]:
        """Steps since the last use; 0: used in the step observed last."""
        return self.step - self.last_use


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What all policies share; `value` is what sets them apart.

    Attributes:
      half_life: steps after which a use counts half; infinite: uses are never forgotten.
      gate_weight, gate_top: weight of the newest step in the average of gates, and how many
        experts of a step take part in it; the others count as zero.
    """

    moves: ClassVar[bool] = True  # whether residents are ever exchanged

    half_life: float = 128.0
    gate_weight: float = 0.5
    gate_top: int = 12

    def __post_init__(self):
        if not self.half_life > 0:
            raise ValueError(f"half_life is {self.half_life}; it counts steps, make it positive")
        if not 0 < self.gate_weight <= 1:
            raise ValueError(f"gate_weight is {self.gate_weight}; it must lie in (0, 1]")
        if self.gate_top < 1:
            raise ValueError(f"gate_top is {self.gate_top}; at least one expert must take part")

    @property
    def decay(self) -> float:
        """What a use counts after one step."""
        return 0.5 ** (1 / self.half_life)

    def start(self, experts: int | tuple[int, ...]) -> UseHistory:
        """The history before the first step, of one layer or of a shape (layers, experts)."""
        zeros = np.zeros(experts)
        return UseHistory(step=0, last_use=zeros, uses=zeros, interval=zeros, gate=zeros)

    def observe(
        self,
        state: UseHistory,
        counts: Int[np.ndarray, "*layers experts"],
        gates: Float[np.ndarray, "*layers experts"],
    ) -> UseHistory:
        """The history after one more step: tokens routed to each expert, and summed gates."""
        if counts.shape != state.uses.shape or gates.shape != state.uses.shape:
            raise ValueError(
                f"counts have shape {counts.shape} and gates {gates.shape}, the history has "
                f"{state.uses.shape}; observe the layers and experts it was started with"
            )
        step, used = state.step + 1, counts > 0
        gap = step - state.last_use
        # The first use of all has nothing but the time since the start to go by.
        interval = np.where(state.uses > 0, (state.interval + gap) / 2, gap)
        return UseHistory(
            step=step,
            last_use=np.where(used, float(step), state.last_use),
            uses=self.decay * state.uses + used,
            interval=np.where(used, interval, state.interval),
            gate=(1 - self.gate_weight) * state.gate + self.gate_weight * self._shares(gates),
        )

    def seed(
        self, state: UseHistory, rates: Float[np.ndarray, "*layers experts"], steps: int
    ) -> UseHistory:
        """The history as it would be expected after `steps` steps of known use.

        `rates` are the probabilities that one step uses an expert.
        """
        step, seen = state.step + steps, rates > 0
        expected = 1 / np.maximum(rates, 1e-12)
        fade = self.decay**steps
        weight = steps if fade == 1 else (1 - fade) / (1 - self.decay)
        share = rates / np.maximum(rates.sum(-1, keepdims=True), 1e-12)
        return UseHistory(
            step=step,
            last_use=np.where(
                seen, np.maximum(step + 1 - expected, state.last_use), state.last_use
            ),
            uses=fade * state.uses + weight * rates,
            interval=np.where(seen, expected, state.interval),
            gate=np.where(rates.sum(-1, keepdims=True) > 0, share, state.gate),
        )

    def value(self, state: UseHistory) -> Float[np.ndarray, "*layers experts"]:
        """What keeping each expert is worth; only the order has a meaning."""
        raise NotImplementedError

    def _shares(self, gates: Num[np.ndarray, "*layers experts"]) -> np.ndarray:
        shares = gates / np.maximum(gates.sum(-1, keepdims=True), 1e-12)
        if self.gate_top >= gates.shape[-1]:
            return shares
        least = np.partition(shares, -self.gate_top, axis=-1)[..., -self.gate_top, None]
        return np.where(shares >= least, shares, 0.0)


@dataclass(frozen=True, kw_only=True)
class Static(Policy):
    """Keeps what was placed at the start; the baseline that moves nothing."""

    moves: ClassVar[bool] = False

    def value(self, state: UseHistory) -> Float[np.ndarray, "*layers experts"]:
        """All experts are worth the same."""
        return np.zeros_like(state.uses)


@dataclass(frozen=True, kw_only=True)
class LeastRecentlyUsed(Policy):
    """Evicts what was not used for longest: mixtral-offloading, FreeToken, llama.cpp."""

    def value(self, state: UseHistory) -> Float[np.ndarray, "*layers experts"]:
        """The younger, the better."""
        return -state.age


@dataclass(frozen=True, kw_only=True)
class LeastFrequentlyUsed(Policy):
    """Evicts what was used least, older uses counting less: s <- decay * s + 1."""

    def value(self, state: UseHistory) -> Float[np.ndarray, "*layers experts"]:
        """Decayed number of uses."""
        return state.uses


@dataclass(frozen=True, kw_only=True)
class FrequencyAndRecency(Policy):
    """Uses divided by age + 1 (LFRU): the best causal policy in most workloads of 2608.07911."""

    half_life: float = float("inf")

    def value(self, state: UseHistory) -> Float[np.ndarray, "*layers experts"]:
        """Uses per step of age."""
        return state.uses / (state.age + 1)


@dataclass(frozen=True, kw_only=True)
class Score(Policy):
    """Average of the router's shares, s <- a * p * [p among the largest] + (1 - a) * s.

    HybriMoE's, with its constants a = 0.5 and 12 experts.
    """

    def value(self, state: UseHistory) -> Float[np.ndarray, "*layers experts"]:
        """The averaged share."""
        return state.gate


@dataclass(frozen=True, kw_only=True)
class LeastStale(Policy):
    """Evicts the expert whose age most exceeds its own usual interval.

    The idea is that of 2602.03921; its formula here, age over interval, is ours.
    """

    def value(self, state: UseHistory) -> Float[np.ndarray, "*layers experts"]:
        """Minus the age in units of the usual interval; never used: worth least."""
        staleness = state.age / np.maximum(state.interval, 1)
        return np.where(state.uses > 0, -staleness, -np.inf)


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "static": Static(),
        "lru": LeastRecentlyUsed(),
        "lfu": LeastFrequentlyUsed(),
        "lfru": FrequencyAndRecency(),
        "score": Score(),
        "least_stale": LeastStale(),
    }
)


def policy_named(policy: str | Policy) -> Policy:
    """The policy of that name, or the one given. Raises ValueError for an unknown name."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"no policy is called {policy!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[policy]
