"""A calibration with round figures, as if measured."""

from host_offload.calibration import SIZES, Calibration, Curve


def curve(scale):
    seconds = tuple(scale * (1.0 + size) for size in SIZES)
    return Curve(seconds=seconds, p90=seconds, measured=(True,) * len(SIZES))


FOUND = Calibration(
    sizes=SIZES,
    host=curve(2.0),
    device=curve(1.0),
    work_bytes=1000,
    transfer=0.5,
    link_latency=0.25,
    host_launch=0.125,
    read_rate=4000.0,
    spent=3.0,
)
