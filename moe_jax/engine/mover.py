"""Exchanges experts between device and host after a step, where a policy finds it worth while.

Knows reports and residency; the exchange itself is the runner's.
"""

import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from host_offload.interrupts import hold_interrupts
from moe_jax.engine.runner import Runner, StepReport
from moe_jax.engine.swap import violations
from moe_jax.model.experts import LayerExperts
from moe_jax.placement.policies import Policy
from moe_jax.placement.residency import (
    Swap,
    apply_swap,
    observe,
    propose_swaps,
    start_residency,
    swap_costs,
    warm_start,
)

PAUSE = 64  # steps without swaps after one that failed: memory is seldom free again at once

_log = logging.getLogger(__name__)


class ExpertMover:
    """Keeps the experts of one runner where a policy wants them.

    Attributes:
      residency: which expert is in which slot, and how experts were used.
      swaps: exchanges made so far.
      failures: exchanges that failed; each is logged as a warning.
    """

    def __init__(self, runner: Runner, policy: str | Policy, most_per_step: int):
        self._runner = runner
        self._most = most_per_step
        self._curves = runner.model.curves
        self._costs = swap_costs(self._curves)
        slots = tuple(
            np.zeros(0, np.int64) if layer.experts is None else _in_slots(layer.experts)
            for layer in runner.model.layers
        )
        self.residency = start_residency(slots, runner.model.config.moe.num_experts, policy)
        self.swaps = self.failures = 0
        self._paused_until = 0

    def after_step(self, reports: Sequence[StepReport], prompt_tokens: int) -> None:
        """Learns from a step, and swaps what pays.

        `prompt_tokens` is 0 in decode; with prompts in it, the number of all its tokens.
        """
        if not self.residency.policy.moves or not reports:
            return
        reports = [report.read() for report in reports]
        counts = np.stack([report.tally.counts for report in reports]).sum(axis=0, dtype=np.int64)
        if prompt_tokens:
            self.residency = warm_start(self.residency, counts, prompt_tokens)
        else:
            gates = np.stack([report.tally.gates for report in reports]).sum(
                axis=0, dtype=np.float64
            )
            self.residency = observe(self.residency, counts, gates)
        curves = self._runner.model.curves
        if curves is not self._curves:  # read from the device once, not after every step
            self._curves, self._costs = curves, swap_costs(curves)
        if self.residency.step < self._paused_until:
            return
        for swap in propose_swaps(self.residency, self._costs, self._most, None):
            if not self._made(swap):
                break

    def _made(self, swap: Swap) -> bool:
        """Whether two experts have changed places; if they have not, the engine can go on.

        Raises RuntimeError if it cannot.
        """
        residency = apply_swap(self.residency, swap)
        # Both or neither: an interrupt between them would leave two views of one slot.
        with hold_interrupts():
            try:
                self._runner.swap(swap.layer, swap.incoming, swap.outgoing)
            except (RuntimeError, MemoryError) as error:
                self._give_up(swap, error)
                return False
            self.residency = residency
            self.swaps += 1
        return True

    def _give_up(self, swap: Swap, error: Exception) -> None:
        experts = self._runner.model.layers[swap.layer].experts
        if experts is None or violations(experts):
            raise RuntimeError(
                f"the resident experts of layer {swap.layer} were lost when expert "
                f"{swap.incoming} was to replace {swap.outgoing}: {error}; load the model anew"
            ) from error
        self.failures += 1
        self._paused_until = self.residency.step + PAUSE
        _log.warning(
            "in layer %d expert %d could not replace expert %d, and both stay where they are; "
            "there are no swaps for %d steps: %s",
            swap.layer,
            swap.incoming,
            swap.outgoing,
            PAUSE,
            error,
        )


def _in_slots(experts: LayerExperts) -> Int[np.ndarray, " slots"]:
    """The expert in each slot of a layer."""
    return np.argsort(np.asarray(experts.address))[: experts.slots]
