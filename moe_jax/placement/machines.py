"""Machines nobody needs to have: rates from data sheets, and the cost curves they imply.

Knows no devices of this process: what a real machine does is measured, not read here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax.numpy as jnp

from moe_jax.placement.curves import CostCurves

# What programs get of a data sheet's figure. Memory and links: long, regular reads.
BANDWIDTH_SHARE = 0.85
COMPUTE_SHARE = 0.6
_KNOTS = 18  # powers of two; the last one is far past every bend, and the last slope goes on


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A host and a device. Rates are peaks, in bytes/s and FLOP/s of bfloat16; times in seconds.

    Attributes:
      name: how tables call it.
      device_bytes: device memory.
      device_read, device_flops: of the device.
      link_rate, link_latency: from host memory to the device, one way.
      host_read, host_flops: of the host's memory and of all its cores.
      device_launch, host_launch: starting one expert, and starting the host computation of a layer.
      serial_host: nothing overlaps a host computation, as on TPU, where XLA schedules none beside
        it; the curves then say so, and a layer takes the sum of the host's time and the device's.
      source: where the figures come from, and which of them are assumptions.
    """

    name: str
    device_bytes: int
    device_read: float
    device_flops: float
    link_rate: float
    link_latency: float
    host_read: float
    host_flops: float
    device_launch: float = 10e-6
    host_launch: float = 50e-6
    serial_host: bool = False
    source: str

    def __post_init__(self):
        for name in ("device_read", "device_flops", "link_rate", "host_read", "host_flops"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{self.name}: {name} is {getattr(self, name)}; a rate must be positive"
                )


MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "rtx4090": Machine(
            name="rtx4090",
            device_bytes=24 * 2**30,
            device_read=1008e9,
            device_flops=165.2e12,
            link_rate=31.5e9,
            link_latency=10e-6,
            host_read=83.2e9,
            host_flops=4.6e12,
            source="NVIDIA Ada architecture whitepaper (1008 GB/s, 165.2 TFLOP/s dense, float32 "
            "sums), PCIe 4.0 x16; host: Ryzen 9 7950X, two channels of DDR5-5200, 16 cores at "
            "4.5 GHz x 64 FLOP (AVX-512 BF16)",
        ),
        "h200": Machine(
            name="h200",
            device_bytes=141 * 10**9,
            device_read=4.8e12,
            device_flops=989e12,
            link_rate=63e9,
            link_latency=10e-6,
            host_read=307.2e9,
            host_flops=56e12,
            source="NVIDIA H200 data sheet (141 GB, 4.8 TB/s, 989 TFLOP/s dense), PCIe 5.0 x16; "
            "host: one Xeon Platinum 8480+, eight channels of DDR5-4800, 56 cores; 1 TFLOP/s a "
            "core assumed, since XLA reaches about 0.6 with AMX on two of them",
        ),
        "gh200": Machine(
            name="gh200",
            device_bytes=96 * 10**9,
            device_read=4.0e12,
            device_flops=990e12,
            link_rate=450e9,
            link_latency=5e-6,
            host_read=512e9,
            host_flops=28e12,
            source="NVIDIA GH200 data sheet (96 GB HBM3 at 4 TB/s, 990 TFLOP/s dense, NVLink-C2C "
            "900 GB/s both ways together, LPDDR5X up to 512 GB/s, 72 Neoverse V2 cores); host "
            "FLOP/s: 3.1 GHz x 128 (BFMMLA), an assumption",
        ),
        "v5e": Machine(
            name="v5e",
            device_bytes=16 * 2**30,
            device_read=819e9,
            device_flops=197e12,
            link_rate=15.75e9,
            link_latency=20e-6,
            host_read=51.2e9,
            host_flops=1.5e12,
            serial_host=True,
            source="Google Cloud TPU v5e documentation (16 GB, 819 GB/s, 197 TFLOP/s); its host is "
            "not documented: PCIe 3.0 x16, and for one chip two channels of DDR4-3200 and 24 "
            "virtual cores of AVX2, are assumptions",
        ),
    }
)


def machine_named(name: str) -> Machine:
    """The machine of that name. Raises ValueError for an unknown name."""
    if name not in MACHINES:
        raise ValueError(f"no machine is called {name!r}; choose one of {', '.join(MACHINES)}")
    return MACHINES[name]


def expert_bytes(embed: int, ffn: int, itemsize: int) -> int:
    """Bytes of one expert: gate, up and down projections."""
    return 3 * embed * ffn * itemsize


def curves_for(
    machine: Machine, embed: int, ffn: int, itemsize: int = 2, pieces: int = 1
) -> CostCurves:
    """The costs of one expert: flat as long as reading its W bytes takes longer, then linear.

    seconds(n) = launch + max(W / read rate, 2 P n / compute rate), P parameters, on either side;
    the host's launch is paid once per layer. Rates are `BANDWIDTH_SHARE` and `COMPUTE_SHARE` of
    the machine's peaks. With more `pieces` they are the costs of one of them, cut along ffn: W and
    P are divided, and each piece on the device is launched for itself. The host goes from piece to
    piece as it goes from expert to expert, at no cost.

    Raises ValueError if a size is not positive, or ffn cannot be cut into so many equal pieces.
    """
    sizes = {"embed": embed, "ffn": ffn, "itemsize": itemsize}
    if wrong := {name: size for name, size in sizes.items() if size < 1}:
        raise ValueError(f"{wrong}: an expert's sizes must be positive")
    if pieces < 1 or ffn % pieces:
        raise ValueError(f"ffn {ffn} cannot be cut into {pieces} equal pieces; choose a divisor")
    size = expert_bytes(embed, ffn // pieces, itemsize)
    flops = 2 * size / itemsize  # of one token

    def bend(read: float, compute: float) -> float:
        return (size / read * compute * COMPUTE_SHARE) / (flops * BANDWIDTH_SHARE)

    # Knots at both bends: what lies between is then exactly linear.
    bends = [bend(machine.host_read, machine.host_flops)]
    bends.append(bend(machine.device_read, machine.device_flops))
    knots = sorted({2.0**i for i in range(_KNOTS)} | {b for b in bends if 1 < b < 2**_KNOTS})
    tokens = jnp.asarray(knots, jnp.float32)

    def curve(launch: float, read: float, compute: float) -> jnp.ndarray:
        flat = jnp.float32(size / (read * BANDWIDTH_SHARE))
        return launch + jnp.maximum(flat, tokens * (flops / (compute * COMPUTE_SHARE)))

    return CostCurves(
        tokens=tokens,
        host=curve(0.0, machine.host_read, machine.host_flops),
        device=curve(machine.device_launch, machine.device_read, machine.device_flops),
        stream=jnp.float32(size / (machine.link_rate * BANDWIDTH_SHARE)),
        host_launch=jnp.float32(machine.host_launch),
        link_latency=jnp.float32(machine.link_latency),
        memory=jnp.float32(size / (machine.host_read * BANDWIDTH_SHARE)),
        host_beside=jnp.float32(not machine.serial_host),
    )
