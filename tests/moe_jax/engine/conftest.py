"""An engine that loaded the tiny checkpoint, changed copies of its folder, and a routing trace."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.engine.arrays import ArrayReceiver
from moe_jax.placement.trace import make_trace, save_trace


def share_evenly(engine: moe_jax.Engine) -> None:
    """Puts an engine on a machine where host and link take a second for each missing expert."""
    model = engine._loop.runner.model
    even = jnp.full_like(model.curves.host, 1.0)
    curves = dataclasses.replace(
        model.curves,
        host=even,
        device=even * 1e-3,
        stream=jnp.float32(1),
        host_beside=jnp.float32(1),
        link_beside=jnp.float32(1),
    )
    engine._loop.runner.model = dataclasses.replace(model, curves=curves)


@pytest.fixture
def banks(monkeypatch) -> None:
    """Resident experts lie in banks, as on other backends; the CPU can run them too."""
    plain = ArrayReceiver.__init__

    def with_bank(self, *arguments):
        plain(self, *arguments)
        self._use_bank = True

    monkeypatch.setattr(ArrayReceiver, "__init__", with_bank)


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
