"""Compiles functions for an NVIDIA H200 or a TPU v5e on a machine that has neither.

A function is traced on CPU devices with the memory kind of every argument, lowered for the target
and handed to the real XLA compiler of that target. Nothing is executed, no time is told, and an
abort of a compiler ends the process. Needs the extra `offline` and JAX_PLATFORMS=cpu.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxlib import xla_client

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked about a TPU
if "optimization_level" in os.environ.get("XLA_FLAGS", ""):
    raise RuntimeError("programs are to be proven as they are served: pytest --compile served")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no lock file: no TPU is opened

Target = Literal["h200", "v5e"]

# What XLA:GPU wants to know about the device, as its data sheet says.
_H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 12 patch: 0 }
gpu_device_info {
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_address_bits: 64
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: SHARED_MEMORY
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 150754820096
  memory_bandwidth: 4800000000000
}
"""


@dataclass(frozen=True)
class Compiled:
    """The optimised program as text, and what it needs beyond arguments and results."""

    text: str
    temporary_bytes: int
    host_argument_bytes: int


def array(shape: Sequence[int], dtype: Any, kind: str = "device") -> jax.ShapeDtypeStruct:
    """An argument in a memory kind, without its numbers."""
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("one",))
    sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def compile_for(
    target: Target,
    function: Callable[..., Any],
    *arguments: Any,
    shared_memory: int = 232448,
    donated: tuple[int, ...] = (),
    **flags: Any,
) -> Compiled:
    """Compiles function(*arguments); what the compiler refuses is a JaxRuntimeError.

    Args:
      arguments: trees of `array`s.
      shared_memory: bytes a block of an H200 may use; give less to see that a kernel fits others.
      donated: which of the arguments may become results.
      flags: XLA options; those given to `jax.jit` do not reach the compiler this way.
    """
    platform, described = {
        "h200": ("cuda", AbstractDevice("NVIDIA H200", 132, "gpu")),
        "v5e": ("tpu", AbstractDevice("TPU v5 lite", 1, "tpu")),
    }[target]
    # Lowering a Pallas kernel asks the mesh what device it is for.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=described)):
        jitted = jax.jit(function, donate_argnums=donated)
        lowered = jitted.trace(*arguments).lower(lowering_platforms=(platform,))
    if target == "h200":
        topology: Any = topologies.get_topology_desc(
            "",
            "cuda",
            target_config=_H200.replace("SHARED_MEMORY", str(shared_memory)),
            topology="1x1x1",
        )
    else:
        topology = topologies.get_topology_desc("v5e:2x2", "tpu")
    device = topology.devices[0]
    options = xla_client.CompileOptions()
    options.env_option_overrides = list(flags.items())
    devices = xla_client.DeviceList((device,))
    program = device.client.compile(lowered.compiler_ir("stablehlo"), devices, options)
    stats = program.get_compiled_memory_stats()
    return Compiled(
        text="\n".join(module.to_string() for module in program.hlo_modules()),
        temporary_bytes=stats.temp_size_in_bytes,
        host_argument_bytes=stats.host_argument_size_in_bytes,
    )


def kernels(compiled: Compiled) -> list[str]:
    """The Pallas kernels in the optimised program, by their custom call."""
    return re.findall(
        r'custom_call_target="(__gpu\$xla\.gpu\.triton|tpu_custom_call)"', compiled.text
    )


@dataclass(frozen=True)
class Instruction:
    """One line of a program: its result's type as text, what it does, and whose results it uses."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    @property
    def works(self) -> bool:
        """Whether the device does something, beyond naming what is there or waiting for it."""
        return self.opcode not in _NO_WORK and not self.opcode.endswith("-done")


_NO_WORK = {"bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter", "tuple"}


def computations(compiled: Compiled) -> dict[str, list[Instruction]]:
    """The computations that the device runs, as scheduled; fused ones are among them."""
    found = {}
    for head, name, body in re.findall(
        r"(?ms)^((?:ENTRY )?%([\w.-]+) \([^\n]*\{)$\n(.*?)^\}", compiled.text
    ):
        if 'execution_thread="host"' not in head:
            lines = re.findall(r"(?m)^ +(?:ROOT )?%([\w.-]+) = (.+?) ([\w-]+)\((.*)$", body)
            found[name] = [
                Instruction(name, kind, opcode, _operands(rest), rest)
                for name, kind, opcode, rest in lines
            ]
    return found


def _operands(rest: str) -> tuple[str, ...]:
    return tuple(re.findall(r"%([\w.-]+)", rest.split(")")[0]))


def _until_done(start: int, lines: list[Instruction]) -> list[Instruction]:
    """What is scheduled between an asynchronous start and the first use of it, its done."""
    name = lines[start].name
    done = next((i for i, line in enumerate(lines) if name in line.operands), start)
    return [line for line in lines[start + 1 : done] if line.works]


@dataclass(frozen=True)
class HostCall:
    """A host computation: what it is given, and the work scheduled beside it."""

    operands: list[Instruction]
    beside: list[Instruction]


def host_calls(compiled: Compiled) -> list[HostCall]:
    """Every host computation of a program."""
    calls = []
    for lines in computations(compiled).values():
        by_name = {line.name: line for line in lines}
        calls += [
            HostCall([by_name[name] for name in line.operands], _until_done(at, lines))
            for at, line in enumerate(lines)
            if 'custom_call_target="HostExecute"' in line.text
        ]
    return calls


@dataclass(frozen=True)
class Fetch:
    """A copy of an array from host to device memory.

    Attributes:
      beside: the work scheduled between its start and its done, other fetches apart.
      reads: the types of the arrays that this work reads.
    """

    beside: list[Instruction]
    reads: list[str]


def fetches(compiled: Compiled) -> list[Fetch]:
    """Every copy from host to device memory, wherever it stands in a program."""
    found = []
    for lines in computations(compiled).values():
        by_name = {line.name: line for line in lines}

        def origin(name: str, by_name: dict[str, Instruction] = by_name) -> Instruction:
            line = by_name[name]
            return origin(line.operands[0], by_name) if line.opcode == "bitcast" else line

        begun = [
            line.opcode == "copy-start" and "S(5)" in origin(line.operands[0]).type
            for line in lines
        ]
        names = {line.name for line, is_fetch in zip(lines, begun, strict=True) if is_fetch}
        for at in (i for i, is_fetch in enumerate(begun) if is_fetch):
            beside = [line for line in _until_done(at, lines) if line.name not in names]
            reads = [origin(name).type for line in beside for name in line.operands]
            found.append(Fetch(beside, reads))
    return found
