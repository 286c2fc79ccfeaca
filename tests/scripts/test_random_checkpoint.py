"""A random checkpoint is made once, and never in the place of another."""

import importlib
import json

import pytest

from tests.scripts.conftest import SCRIPTS

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.fixture
def module(monkeypatch):
    """The script, with fewer random numbers."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("random_checkpoint")
    monkeypatch.setattr(module, "_POOL", 1 << 16)
    return module


def test_a_complete_checkpoint_of_the_shape_stays(module, tmp_path):
    config = module.config_of("mixtral_0.8b") | SMALL
    module.write_checkpoint(tmp_path, config)
    shard = tmp_path / "model-layer-0.safetensors"
    written = shard.stat().st_mtime_ns
    module.write_checkpoint(tmp_path, config)
    assert shard.stat().st_mtime_ns == written
    (tmp_path / "model.safetensors.index.json").unlink()  # as if writing had been cut off
    module.write_checkpoint(tmp_path, config)
    assert shard.stat().st_mtime_ns > written


@pytest.mark.parametrize(
    "text, message",
    [
        (
            json.dumps({"architectures": ["MixtralForCausalLM"], "model_type": "olmoe"}),
            "{0} holds a checkpoint of another shape: its model_type is olmoe, not mixtral; give "
            "another folder, or delete this one",
        ),
        ("{", "{0}/config.json is no JSON: "),
    ],
)
def test_a_folder_with_another_checkpoint_is_refused(run, tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    done = run("random_checkpoint.py", str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message.replace('{0}', str(tmp_path))}")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
