"""A tiny checkpoint for all, and costs measured only as far as must be: nothing depends on them."""

from pathlib import Path

import pytest

from moe_jax.engine import expert_timing
from tests.moe_jax.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="session", autouse=True)
def quick_calibration():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_timing, "SECONDS", 0.0)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A qwen3_moe folder: two layers of four experts around a dense one, float32."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(folder)
    return folder
