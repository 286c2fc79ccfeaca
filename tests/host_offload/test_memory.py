"""Byte counts and memory kinds."""

import jax.numpy as jnp
import pytest

from host_offload import memory
from host_offload.memory import (
    format_bytes,
    host_memory_bytes,
    parse_bytes,
    to_device,
    to_host,
    zeros,
)


@pytest.mark.parametrize(
    "amount, expected",
    [
        (123, 123),
        ("123", 123),
        ("24GiB", 24 << 30),
        ("1.5 MiB", 3 << 19),
        ("512 MB", 512_000_000),
        ("2kb", 2000),
    ],
)
def test_sizes_are_read(amount, expected):
    assert parse_bytes(amount) == expected


@pytest.mark.parametrize("amount", ["", "many", "-3GiB", "3 GiBs", True, 1.5, None, "nan"])
def test_other_text_is_refused(amount):
    with pytest.raises(ValueError, match="a memory size must be"):
        parse_bytes(amount)


@pytest.mark.parametrize("amount", [0, -1, "0GiB"])
def test_sizes_are_positive(amount):
    with pytest.raises(ValueError, match="must be positive"):
        parse_bytes(amount)


def test_sizes_are_written():
    assert format_bytes(1000) == "1000 B"
    assert format_bytes(3 << 29) == "1.50 GiB"


def test_arrays_cross_both_ways():
    array = jnp.arange(6, dtype=jnp.float32)
    host = to_host({"a": array})["a"]
    assert host.sharding.memory_kind == "pinned_host"
    back = to_device(host)
    assert back.sharding.memory_kind == "device"
    assert back.tolist() == array.tolist()
    assert zeros((2, 3), jnp.bfloat16, "pinned_host").sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize(
    "group, limits, allowed",
    [
        ("0::/job/step", {}, None),
        ("0::/job/step", {"v2/memory.max": "max", "v2/job/memory.max": "700"}, 700),
        ("0::/job/step", {"v2/job/step/memory.max": "600", "v2/job/memory.max": "700"}, 600),
        ("0::/not/seen/from/here", {"v2/memory.max": "800"}, 800),
        ("0::/", {"v2/memory.max": "800", "v2/job/memory.max": "700"}, 800),
        ("4:memory:/job", {"v1/job/limit": "500", "v1/limit": "9223372036854771712"}, 500),
        ("4:memory:/job", {"v1/limit": "9223372036854771712"}, None),
        ("5:cpu,cpuacct:/job", {"v1/job/limit": "500", "v2/job/memory.max": "700"}, None),
        (None, {"v2/memory.max": "700"}, None),
    ],
)
def test_a_container_may_have_less_memory_than_the_machine(
    tmp_path, monkeypatch, group, limits, allowed
):
    own = tmp_path / "cgroup"
    if group is not None:
        own.write_text(f"9:pids:/elsewhere\n{group}\n")
    for name, text in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    groups = {"": (tmp_path / "v2", "memory.max"), "memory": (tmp_path / "v1", "limit")}
    monkeypatch.setattr(memory, "_OWN_GROUP", own)
    monkeypatch.setattr(memory, "_GROUPS", {})
    physical = host_memory_bytes()
    assert physical > 2**30
    monkeypatch.setattr(memory, "_GROUPS", groups)
    assert host_memory_bytes() == (physical if allowed is None else allowed)
