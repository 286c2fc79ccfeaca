import pytest

from moe_jax.checkpoint import Checkpoint, open_checkpoint


def test_is_a_checkpoint(make_folder):
    assert isinstance(open_checkpoint(str(make_folder().path)), Checkpoint)


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*absent; checkpoints are not down"):
        open_checkpoint(tmp_path / "absent")


def test_not_a_folder(make_folder):
    with pytest.raises(ValueError, match=r"config\.json is not a folder; name the folder"):
        open_checkpoint(make_folder().path / "config.json")


def test_no_known_format(tmp_path):
    message = r"is no checkpoint: looked for moe_jax_checkpoint\.json .* config\.json beside model"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)
