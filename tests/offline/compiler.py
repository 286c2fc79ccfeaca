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
    **flags: Any,
) -> Compiled:
    """Compiles function(*arguments); what the compiler refuses is a JaxRuntimeError.

    Args:
      arguments: trees of `array`s.
      shared_memory: bytes a block of an H200 may use; give less to see that a kernel fits others.
      flags: XLA options; those given to `jax.jit` do not reach the compiler this way.
    """
    platform, described = {
        "h200": ("cuda", AbstractDevice("NVIDIA H200", 132, "gpu")),
        "v5e": ("tpu", AbstractDevice("TPU v5 lite", 1, "tpu")),
    }[target]
    # Lowering a Pallas kernel asks the mesh what device it is for.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=described)):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
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


def host_calls(compiled: Compiled) -> list[tuple[list[str], list[str]]]:
    """Of every host computation: the types of its operands, and the work scheduled beside it."""
    no_work = {"bitcast", "constant", "get-tuple-element", "parameter", "tuple"}
    calls = []
    for block in compiled.text.split("\n}"):
        lines = re.findall(r"(?m)^ +(?:ROOT )?%([\w.-]+) = (.+?) ([\w-]+)\((.*)$", block)
        types = {name: kind for name, kind, _, _ in lines}
        for at, (name, _, _, rest) in enumerate(lines):
            if 'custom_call_target="HostExecute"' in rest:
                operands = [types[n] for n in re.findall(r"%([\w.-]+)", rest.split(")")[0])]
                done = next((i for i, x in enumerate(lines) if x[3].startswith(f"%{name})")), at)
                beside = [n for n, _, opcode, _ in lines[at + 1 : done] if opcode not in no_work]
                calls.append((operands, beside))
    return calls
