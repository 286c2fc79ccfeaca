import pathlib

import pytest

from moe_jax.evaluate.corpus import (
    Document,
    is_held_out,
    module_name,
    pack_library,
    read_library,
    split_documents,
)


@pytest.mark.parametrize(
    ("module", "paths"),
    {
        "re": ["re/_parser.py", "sre_parse.py", "test/test_re.py", "test/re_tests.py"],
        "datetime": ["datetime.py", "_pydatetime.py", "test/datetimetester.py"],
        "json": ["json/decoder.py", "test/test_json/test_decode.py"],
        "http": ["http/client.py", "test/test_httplib.py", "test/test_http_cookies.py"],
        "heapq": ["heapq.py", "test/test_heapq.py"],
        "base": ["base64.py", "test/test_base64.py"],
        "test": ["test/__init__.py"],
    }.items(),
)
def test_files_that_share_text_share_a_module(module, paths):
    assert [module_name(path) for path in paths] == [module] * len(paths)


def test_the_rule_never_changes():
    names = ["abc", "argparse", "ast", "asyncio", "bisect", "csv", "ctypes", "datetime", "enum"]
    names += ["heapq", "json", "pickle", "random", "re", "socket", "urllib", "xml", "zipfile"]
    assert [name for name in names if is_held_out(f"{name}.py")] == HELD_OUT


HELD_OUT = ["re", "urllib"]


def write(folder, files):
    for path, content in files.items():
        file = pathlib.Path(folder, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def test_only_usable_sources_are_read(tmp_path):
    write(
        tmp_path,
        {
            "b.py": b"b = 1\r\n",
            "a/c.py": "ä = 2\n".encode(),
            "latin.py": "ä = 2\n".encode("latin-1"),
            "empty.py": b" \n",
            "encodings/table.py": b'""" generated with gencodec.py """\n',
            "site-packages/other.py": b"x = 1\n",
            "_sysconfigdata_x.py": b"x = 1\n",
            "notes.txt": b"no source",
        },
    )
    assert read_library(tmp_path) == [
        Document(path="a/c.py", text="ä = 2\n"),
        Document(path="b.py", text="b = 1\r\n"),
    ]
    assert read_library(tmp_path)[0].size == 7


def test_a_folder_without_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no Python source file; give a standard library's"):
        read_library(tmp_path)


def test_an_archive_holds_what_the_folders_hold_and_later_ones_add_modules_only(tmp_path):
    write(tmp_path / "new", {"re/__init__.py": b"new\n", "json/a.py": b"new\n"})
    write(tmp_path / "old", {"sre_parse.py": b"old\n", "imp.py": b"old\n"})
    archive = tmp_path / "library.tar.xz"
    size = pack_library([tmp_path / "new", tmp_path / "old"], archive)
    assert size == archive.stat().st_size
    found = {document.path: document.text for document in read_library(archive)}
    assert found == {"imp.py": "old\n", "json/a.py": "new\n", "re/__init__.py": "new\n"}


def test_a_folder_without_source_files_is_not_packed(tmp_path):
    (tmp_path / "empty").mkdir()
    archive = tmp_path / "library.tar.xz"
    for name in ("empty", "missing"):
        with pytest.raises(ValueError, match=rf"{name} holds no Python source file; give a"):
            pack_library([tmp_path / name], archive)
    assert not archive.exists()


def test_this_pythons_library_is_split_without_a_leak():
    training, held_out = split_documents(read_library())
    known = {module_name(document.path) for document in training}
    assert known.isdisjoint(module_name(document.path) for document in held_out)
    part = sum(d.size for d in held_out) / sum(d.size for d in [*training, *held_out])
    assert 0.04 < part < 0.2
    texts = {document.text for document in training}
    shared = sum(d.size for d in held_out if d.text in texts)
    assert shared < 0.002 * sum(d.size for d in held_out)
