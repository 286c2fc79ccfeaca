"""Calibrations with round figures, as if measured, and engines that are given one of them."""

from dataclasses import replace

import pytest

from host_offload.calibration import SIZES, Calibration, Curve
from moe_jax.engine import costs
from moe_jax.engine.expert_timing import ExpertTiming


def curve(first: float, token: float) -> Curve:
    seconds = tuple(first + token * size for size in SIZES)
    return Curve(seconds=seconds, p90=seconds, measured=(True,) * len(SIZES))


FOUND = Calibration(
    sizes=SIZES,
    host=curve(2.0, 2.0),
    device=curve(1.0, 1.0),
    work_bytes=1000,
    transfer=0.5,
    link_latency=0.25,
    host_launch=0.125,
    read_rate=4000.0,
    spent=3.0,
)
# A missing expert of up to three tokens is faster on the host, others are streamed.
TINY = replace(
    FOUND,
    host=curve(10e-6, 3e-6),
    device=curve(5e-6, 1e-6),
    transfer=10e-6,
    link_latency=1e-6,
    host_launch=1e-6,
    read_rate=1e9,
)


class KnownTiming(ExpertTiming):
    """Measures nothing."""

    @property
    def key(self):
        """Of no machine: what a process measures that was not told is kept apart."""
        return super().key | {"programs": "none"}

    def measure(self, progress=False, box=None):
        return TINY

    def differs(self, kept):
        return None


@pytest.fixture(scope="session", autouse=True)
def known_costs():
    """Engines know what experts cost without the seconds of measuring, and plan alike each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "ExpertTiming", KnownTiming)
        yield
