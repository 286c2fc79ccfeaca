"""What follows a step: its time joins the totals, and experts change places where that pays.

Brings monitor, mover and runner together; knows no requests.
"""

from collections.abc import Sequence

from moe_jax.engine.monitor import Monitor, StepTime
from moe_jax.engine.mover import ExpertMover
from moe_jax.engine.runner import Runner, StepReport
from moe_jax.placement.residency import Residency


class StepObserver:
    """Looks at every step of one runner."""

    def __init__(self, runner: Runner, monitor: Monitor, mover: ExpertMover):
        self.monitor = monitor
        self.mover = mover
        self._runner = runner
        self._last: tuple[StepReport, Residency] | None = None

    def after_step(
        self, step: StepTime, reports: Sequence[StepReport], residency: Residency
    ) -> None:
        """Takes in a step of requests, which began with these experts resident."""
        self.monitor.after_step(step, reports)
        self._last = reports[-1], residency
        self.mover.after_step(reports, step.tokens if step.prompt_tokens else 0)

    def after_other(self, reports: Sequence[StepReport] = ()) -> None:
        """Takes in steps that nobody timed, or that were broken off or in vain."""
        self.monitor.after_other([*reports, *self._runner.take_reports()])

    def catch_up(self) -> None:
        """Does what the steps so far have left to be done and the next one need not wait for."""
        self.monitor.catch_up()

    def last_step(self) -> tuple[StepReport, Residency]:
        """The last step of a request, and which experts were resident in it.

        Raises ValueError if there was none.
        """
        if self._last is None:
            raise ValueError("there is no step to show yet; generate something first")
        return self._last
