import pytest

from moe_jax.checkpoint.whole_folder import whole_folder


def test_appears_when_the_block_ends(tmp_path):
    folder = tmp_path / "folder"
    with whole_folder(folder) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "file").write_text("x")
        assert not folder.exists()
    assert (folder / "inner" / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), whole_folder(tmp_path / "folder") as aside:
        (aside / "file").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_fills_an_empty_folder_behind_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole_folder(tmp_path / "link") as aside:
        (aside / "file").write_text("x")
    assert (tmp_path / "real" / "file").exists()
