"""Times one expert of a model's shape on the host, over the link and on the device.

Knows the programs that experts run in, not where the numbers go. Up to 16 tokens of an expert run
as in a decode step of so many sequences, more of them as in a prefill chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from host_offload.calibrate import (
    TimeBox,
    cache_bytes,
    measure_host_launch,
    measure_in_time,
    measure_read_rate,
    measure_transfers,
    random_arrays,
    time_beside,
)
from host_offload.calibration import SIZES, Calibration, Curve, Timing, curve_of
from host_offload.host_compute import compiler_options
from host_offload.memory import MemoryKind
from host_offload.rounded_products import jit_rounded
from moe_jax.config import ModelConfig
from moe_jax.engine.progress import progress_bar
from moe_jax.engine.quantize import store_in_int8
from moe_jax.model.dispatch import Dispatch, block_widths, dispatch, num_rows
from moe_jax.model.experts import Expert, ExpertBank, LayerExperts, run_experts, run_on_host
from moe_jax.model.int8 import Int8Expert, int8_bytes
from moe_jax.model.rounded import products_round
from moe_jax.placement.planner import Mode

# In order of importance: bandwidth, then what runs in one program, then what each needs its own.
_ORDER = (1, 64, 512, 128, 32, 256, 8, 4, 2, 16)
_ESSENTIAL = 4  # 1 and 64 tokens, on the host and on the device
# What is begun by then ends within 10 s on a fair machine.
SECONDS = 8.5
_MOST_COPIED = 1 << 30
_LARGE_EXPERT = 8 << 20
_READ_BYTES = 1 << 28
_MOST_DECODED = 16
_CHUNK = SIZES[-1]
_FEWEST_CALLS = 4
# Raise it when what is timed changes: the programs, the blocks, how experts rotate.
_PROGRAMS = 9
_TOLERANCE = 0.25
_TIMER_NOISE = 20e-6
_PROBES = 3

# One program: its operations one by one would each be compiled, and take a second of the few.
_compiled_dispatch = jax.jit(dispatch, static_argnums=(2, 3))


class ExpertTiming:
    """Experts of one model's shape to be timed, and the programs they are timed in.

    There are several groups of a few experts. A program takes one group; calls rotate over them,
    so that weights are as cold as in the model: all groups together are four times as large as the
    processor's caches, or have as many experts as the model.

    Of layers that are `driven`, a streamed expert takes its transfer.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: np.dtype,
        host_dtype: str | None = None,
        driven: bool = False,
    ):
        self.shapes, self.dtype = config.expert_shapes, np.dtype(dtype)
        self.activation, self.moe = config.activation, config.moe
        self.host_dtype = host_dtype
        self.streams_in_program = jax.default_backend() == "cpu" and not driven
        numbers = sum(int(np.prod(shape)) for shape in self.shapes)
        self.bytes = int8_bytes(self.shapes) if host_dtype else numbers * self.dtype.itemsize
        enough = 4 * cache_bytes() // self.bytes + 1
        # A wider group takes longer to compile; of small experts it takes more to outlast a call.
        # Without a choice of two XLA prepares the weights ahead of the loop, in the baseline too.
        self.group = 2 if self.bytes >= _LARGE_EXPERT else 4
        self.distinct = min(self.group, enough)
        of_model = config.moe.num_experts * max(1, sum(config.moe_layers))
        wanted = min(enough, of_model, _MOST_COPIED // self.bytes)
        self.groups = max(1, -(-wanted // self.group))
        self._host_program = self._compiled(self._run_on_host)
        self._device_program = self._compiled(self._run_resident)
        self._stream_program = jax.jit(self._run_streamed, compiler_options=compiler_options())

    def _compiled(self, run: Callable) -> Callable:
        """The program, as the steps have it that these tokens stand for."""
        plain = jax.jit(run, compiler_options=compiler_options())
        rounded = jit_rounded(functools.partial(run, rounded=True))

        def call(experts: Any, x: Array, where: Dispatch) -> Array:
            in_chunk = where.position.shape[0] == _CHUNK
            rounds = in_chunk and products_round(self.bytes, self.dtype, _CHUNK)
            return (rounded if rounds and not self.host_dtype else plain)(experts, x, where)

        return call

    @property
    def key(self) -> dict[str, Any]:
        """What the times depend on besides the machine; JSON values."""
        return {
            "expert_shapes": self.shapes,
            "dtype": self.dtype.name,
            "host_dtype": self.host_dtype,
            "activation": self.activation,
            "streams_in_program": self.streams_in_program,
            "experts_timed": self.distinct * self.groups,
            "programs": _PROGRAMS,
        }

    def measure(self, progress: bool = False, box: TimeBox | None = None) -> Calibration:
        """Times everything, the most important first, until the box is spent."""
        box = box or TimeBox(SECONDS)
        with progress_bar(4 + 2 * len(_ORDER), "calibrating", "step", progress) as bar:

            def step(measure: Callable[[], Any]) -> Any:
                result = measure()
                bar.update()
                return result

            host, device = self._on_host(), self._on_device()
            latency, transfer = step(lambda: self._time_transfers(host, box))
            streamed = step(lambda: self._time_streamed(host, box))
            launch = step(lambda: measure_host_launch(box))
            rate = step(_read_rate)
            programs = {
                "host": functools.partial(self._time, self._host_program, host, box),
                "device": functools.partial(self._time, self._device_program, device, box),
            }
            known: dict[tuple[str, int], Timing] = {}

            def time(place: str, size: int) -> Timing | None:
                block = known.get((place, _ORDER[1]))
                if block and _FEWEST_CALLS * size / _ORDER[1] * block.median > box.left:
                    return None
                known[place, size] = programs[place](size)
                return known[place, size]

            tasks = {
                (place, size): functools.partial(step, functools.partial(time, place, size))
                for size in _ORDER
                for place in programs
            }
            done = measure_in_time(tasks, _ESSENTIAL, box)

        def curve(place: str) -> Curve:
            return curve_of(SIZES, {size: time for (at, size), time in done.items() if at == place})

        on_host, on_device = curve("host"), curve("device")
        return Calibration(
            sizes=SIZES,
            host=on_host,
            device=on_device,
            work_bytes=self.bytes,
            transfer=max(transfer, streamed - on_device.seconds[0]),
            link_latency=latency,
            host_launch=launch,
            # Taken in a slower moment, the rate would forbid what an expert has just reached.
            read_rate=max(rate, self.bytes / on_host.seconds[0]),
            spent=box.spent,
        )

    def differs(self, kept: Calibration) -> str | None:
        """Says how a kept calibration differs from what is timed now; None if they agree.

        Timed are one token on the host, many on the device and, where there is a link, one
        transfer. On a busy machine it takes three disagreements in a row.
        """
        if kept.work_bytes != self.bytes:
            return f"the kept calibration is of {kept.work_bytes} bytes, not {self.bytes}"
        host, device = self._on_host(), self._on_device()
        box = TimeBox(SECONDS)
        few, many = _ORDER[:2]
        probes: dict[str, tuple[float, Callable[[], float]]] = {
            f"an expert with {few} token on the host": (
                kept.host.seconds[SIZES.index(few)],
                lambda: self._time(self._host_program, host, box, few).median,
            ),
            f"an expert with {many} tokens on the device": (
                kept.device.seconds[SIZES.index(many)],
                lambda: self._time(self._device_program, device, box, many).median,
            ),
        }
        # On the CPU backend a copy takes longer in memory that the process never had before.
        if jax.default_backend() != "cpu":
            probes["bringing an expert over the link"] = (
                kept.transfer,
                lambda: self._time_transfers(host, box)[1],
            )
        for name, (expected, probe) in probes.items():
            off = _disagreements(probe, expected)
            if len(off) == _PROBES:
                return (
                    f"{name} takes {off[-1] * 1e3:.3g} ms, {off[-1] / expected:.2f} times what "
                    "the kept calibration says"
                )
        return None

    def _on_host(self) -> list[tuple[Expert | Int8Expert, ...]]:
        stored = store_in_int8 if self.host_dtype else lambda expert: expert
        return [self._separate("pinned_host", stored) for _ in range(self.groups)]

    def _separate(self, kind: MemoryKind, stored: Callable = lambda expert: expert) -> tuple:
        """A group; the second of two huge experts is the first again, to save time and memory."""
        experts = [
            stored(Expert(*random_arrays(self.shapes, self.dtype, kind)))
            for _ in range(self.distinct)
        ]
        return tuple(experts[i % self.distinct] for i in range(self.group))

    def _on_device(self) -> list[tuple[Expert, ...]] | list[ExpertBank]:
        if jax.default_backend() == "cpu":
            return [self._separate("device") for _ in range(self.groups)]
        banks = [(self.group, *shape) for shape in self.shapes]
        return [ExpertBank(*random_arrays(banks, self.dtype, "device")) for _ in range(self.groups)]

    def _time_transfers(
        self, groups: list[tuple[Expert | Int8Expert, ...]], box: TimeBox
    ) -> tuple[float, float]:
        return measure_transfers([group[: self.distinct] for group in groups], box)

    def _time_streamed(self, groups: list[tuple[Expert | Int8Expert, ...]], box: TimeBox) -> float:
        """Seconds of a streamed expert of one token where the program copies it; elsewhere 0."""
        if not self.streams_in_program:
            return 0.0
        # Of huge experts every repeat takes a second.
        return self._time(self._stream_program, groups, box, SIZES[0], fewest=1).median

    def _time(self, program, groups, box: TimeBox, size: int, fewest: int = 3) -> Timing:
        """Times one expert with `size` tokens."""
        tokens = _CHUNK if size > _MOST_DECODED else size * self.group
        experts = min(self.group, tokens // size)
        rows = num_rows(tokens, 1, self.group, self._widths(size))
        (x,) = random_arrays([(rows, self.shapes[1][0])], self.dtype, "device")
        idle = self._dispatch(tokens, size, 0, 0)
        busy = [self._dispatch(tokens, size, first, experts) for first in range(self.group)]
        run = lambda i, where: program(groups[i % len(groups)], x, where)
        timing = time_beside(
            lambda i: run(i, busy[i // len(groups) % self.group]),
            lambda i: run(i, idle),
            box,
            repeats=(fewest, 25),
        )
        return timing.scaled(1 / experts)

    def _widths(self, size: int) -> tuple[int, ...]:
        """The widths of blocks in the model's step in which an expert has `size` tokens.

        Of a chunk's, those that any of the sizes needs: each takes its time to compile.
        """
        tokens = _CHUNK if size > _MOST_DECODED else size
        widths = block_widths(tokens, self.moe.experts_per_token, self.moe.num_experts)
        return tuple(width for width in widths if width in SIZES or width == widths[-1])

    def _dispatch(self, tokens: int, size: int, first: int, experts: int) -> Dispatch:
        """`size` tokens for each of some experts of a group, from the first on, round."""
        owner = (first + np.arange(tokens, dtype=np.int32) // size) % self.group
        valid = np.arange(tokens) < experts * size
        return _compiled_dispatch(owner[:, None], valid, self.group, self._widths(size))

    def _run_resident(
        self,
        experts: tuple[Expert, ...] | ExpertBank,
        rows: Float[Array, "rows embed"],
        where: Dispatch,
        rounded: bool = False,
    ) -> Float[Array, "rows embed"]:
        address = jnp.arange(self.group, dtype=jnp.int32)
        mode = jnp.full(self.group, Mode.RESIDENT.value, jnp.int32)
        layer = LayerExperts(experts, (), address)
        return run_experts(layer, rows, where, mode, self.activation, rounded=rounded)

    def _run_streamed(
        self,
        experts: tuple[Expert | Int8Expert, ...],
        rows: Float[Array, "rows embed"],
        where: Dispatch,
    ) -> Float[Array, "rows embed"]:
        mode = jnp.where(where.counts > 0, Mode.STREAM.value, Mode.IDLE.value)
        layer = LayerExperts((), experts, jnp.arange(self.group, dtype=jnp.int32))
        return run_experts(layer, rows, where, mode, self.activation)

    def _run_on_host(
        self,
        experts: tuple[Expert | Int8Expert, ...],
        rows: Float[Array, "rows embed"],
        where: Dispatch,
        rounded: bool = False,
    ) -> Float[Array, "rows embed"]:
        mode = jnp.full(self.group, Mode.HOST.value, jnp.int32)
        return run_on_host(experts, rows, where, mode, 0, self.activation, rounded)


def _read_rate() -> float:
    """Of host memory; where the link works beside the host, both together may read more."""
    read = functools.partial(measure_read_rate, _READ_BYTES, "pinned_host", repeats=3, pick=min)
    if jax.default_backend() != "gpu":
        return read()
    # A share that the link has brought over before the host is through.
    beside = random_arrays([(_READ_BYTES // 8,)], np.int8, "pinned_host")
    return max(read(), read(beside=beside))


def _disagreements(probe: Callable[[], float], expected: float) -> list[float]:
    """What the probe said until it agreed, or had been asked often enough."""
    off: list[float] = []
    while len(off) < _PROBES:
        seconds = probe()
        if abs(seconds - expected) <= max(_TOLERANCE * expected, _TIMER_NOISE):
            break
        off.append(seconds)
    return off
