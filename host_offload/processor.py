"""What the host's processor is called and which units it has. Knows nothing about arrays."""

import functools
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def processor_name() -> str:
    """The model name that the operating system tells, or else the kind of machine."""
    return _field("model name") or platform.processor() or platform.machine()


@functools.cache
def has_matrix_units() -> bool:
    """Whether the processor multiplies tiles of bfloat16 and int8 in hardware (Intel AMX).

    Only Linux tells; elsewhere the answer is no.
    """
    return {"amx_bf16", "amx_int8"} <= set(_field("flags").split())


@functools.cache
def has_wide_vectors() -> bool:
    """Whether the processor has vectors of 512 bits and 32 registers of them (AVX-512).

    Only Linux tells; elsewhere the answer is no.
    """
    return "avx512f" in _field("flags").split()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies vectors of bfloat16 in hardware (AVX-512 BF16).

    Only Linux tells; elsewhere the answer is no.
    """
    return "avx512_bf16" in _field("flags").split()


def describe_processor() -> str:
    """Its name, and which units it is known to have of those that experts on the host use."""
    units = {
        "AVX-512": has_wide_vectors(),
        "products of bfloat16": multiplies_bfloat16(),
        "AMX": has_matrix_units(),
    }
    found = ", ".join(name for name, has in units.items() if has)
    return f"{processor_name()}, {found or 'without AVX-512 and AMX as far as is known'}"


def _field(name: str) -> str:
    """The first processor's entry of that name; empty where there is none."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    found = (
        line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name
    )
    return next(found, "")
