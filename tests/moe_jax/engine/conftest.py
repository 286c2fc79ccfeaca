"""An engine that loaded the tiny checkpoint, changed copies of its folder, and a routing trace."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import moe_jax
from moe_jax.placement.trace import make_trace, save_trace


@pytest.fixture
def copy(tiny, tmp_path) -> Callable[..., Path]:
    """Copies the folder, leaving files out and setting fields of its JSON files."""

    def copy(*without: str, **fields: dict) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns(*without))
        for name, changes in fields.items():
            file = folder / f"{name}.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder

    return copy


@pytest.fixture(scope="session")
def engine(tiny) -> Iterator[moe_jax.Engine]:
    """The folder, all experts resident, with room for 64 tokens and three sequences."""
    return moe_jax.load(tiny, dtype="float32", max_tokens=64, max_seqs=3, progress=False)


@pytest.fixture(scope="session")
def profile(tmp_path_factory) -> Path:
    """A routing trace of the folder: experts 1 and 3 of the first layer lead, 3 and 2 of the last.

    Two steps of 2 and 3 tokens.
    """
    path = tmp_path_factory.mktemp("profile") / "routing.npz"
    counts = np.array([[[0, 2, 1, 1], [0, 0, 2, 2]], [[2, 2, 0, 2], [2, 0, 1, 3]]])
    save_trace(make_trace(counts, 2, layer=np.array([0, 2])), path)
    return path
