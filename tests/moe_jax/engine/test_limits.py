"""What the machine does not allow is said with numbers, before anything is read."""

from types import SimpleNamespace

import jax
import pytest

import moe_jax
from host_offload import memory as memory_module
from moe_jax.engine import limits
from moe_jax.engine.sizing import device_memory_for

GB = 10**9
NAME = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.usefixtures("gpu")
def test_xla_must_be_told_to_pin_more_than_64_gb(monkeypatch):
    monkeypatch.delenv(NAME, raising=False)
    text = (
        f"80 GB of experts go to pinned host memory, and XLA allows 64 GB; set .* {NAME} to .* 81"
    )
    with pytest.raises(ValueError, match=text):
        limits.check_limits(GB, 80 * GB, driven=False)
    limits.check_limits(GB, 80 * GB, driven=True)  # nobody pins that
    limits.check_limits(GB, 64 * GB, driven=False)
    monkeypatch.setenv(NAME, "80")
    limits.check_limits(GB, 80 * GB, driven=False)


@pytest.mark.usefixtures("gpu")
def test_a_limit_that_is_no_number(monkeypatch):
    monkeypatch.setenv(NAME, "64.5")
    with pytest.raises(ValueError, match=f"{NAME} must be a whole number of GB, got '64.5'"):
        limits.check_limits(GB, 80 * GB, driven=False)


def test_on_the_cpu_device_and_host_share_the_memory(tiny, monkeypatch):
    sizes = {"dtype": "float32", "max_tokens": 64, "max_seqs": 3}
    budget = device_memory_for(tiny, experts=0.5, **sizes)
    plan = moe_jax.load(tiny, device_memory=budget, **sizes).plan.memory
    both = plan.device_bytes_used + plan.host_bytes_used
    monkeypatch.setattr(limits, "host_memory_bytes", lambda: both)
    moe_jax.load(tiny, device_memory=budget, **sizes)
    monkeypatch.setattr(limits, "host_memory_bytes", lambda: both - 1)
    with pytest.raises(ValueError, match="of memory, which on the CPU backend device and host"):
        moe_jax.load(tiny, device_memory=budget, **sizes)


def test_a_device_without_pinned_memory(monkeypatch):
    kinds = [SimpleNamespace(kind="device"), SimpleNamespace(kind="unpinned_host")]
    device = SimpleNamespace(addressable_memories=lambda: kinds)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    text = (
        "has no memory of kind 'pinned_host', .* but device, unpinned_host; use executor='driven'"
    )
    with pytest.raises(ValueError, match=text):
        limits.check_limits(GB, 0, driven=False)
    limits.check_limits(GB, 0, driven=True)


@pytest.mark.parametrize("told", [None, {}])
def test_a_device_that_does_not_tell_its_memory(monkeypatch, told):
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: told)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    with pytest.raises(
        ValueError, match="does not tell how much memory it has; give device_memory="
    ):
        memory_module.device_memory_bytes()
