"""The embedded model, held-out text for it, and damaged copies of its folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

import moe_jax
from moe_jax.engine.load import reference_model_folder
from moe_jax.evaluate.corpus import read_library, split_documents

OPTIONS = {"dtype": "float32", "max_tokens": 6144, "max_seqs": 4, "progress": False}


@pytest.fixture(scope="session")
def engine() -> moe_jax.Engine:
    """The embedded model in float32, all of it on the device."""
    return moe_jax.load(**OPTIONS)


@pytest.fixture(scope="session")
def text(engine) -> np.ndarray:
    """Tokens of modules that the model was not trained on; about 10,000."""
    _, held_out = split_documents(read_library())
    tokens = [engine.tokenizer.encode(one.text) for one in held_out[5:60:11]]
    return np.concatenate(tokens)[:10_000]


@pytest.fixture
def damaged(tmp_path) -> Callable[..., Path]:
    """Copies the embedded model's folder with changed tensors and fields of its config."""

    def damage(change: Callable[[str, jax.Array], jax.Array] | None = None, **fields) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(reference_model_folder(), folder)
        for file in folder.glob("*.safetensors") if change else ():
            tensors = {name: change(name, one) for name, one in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
        return folder

    return damage
