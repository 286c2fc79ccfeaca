"""A tiny checkpoint for all, whose engines are told what experts cost."""

from pathlib import Path

import pytest

from tests.calibrations import known_costs  # noqa: F401
from tests.moe_jax.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A qwen3_moe folder: two layers of four experts around a dense one, float32."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(folder)
    return folder
