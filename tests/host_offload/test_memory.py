"""Byte counts and memory kinds."""

import jax.numpy as jnp
import pytest

from host_offload.memory import format_bytes, parse_bytes, to_device, to_host, zeros


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
