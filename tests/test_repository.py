"""Promises about the source itself."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("moe_jax", "pallas_kernels", "host_offload")
SOURCES = [f for name in PACKAGES for f in sorted((ROOT / name).rglob("*.py"))]
ALL = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "scripts").rglob("*.py"))]


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_files_stay_small(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 400, f"{relative(path)} has {lines} lines; look for a second subject in it"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{relative(path)} has no docstring"


def unread_config_fields(files):
    """Names declared in a class called *Config that no code ever reads."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    configs = [n for n in nodes if isinstance(n, ast.ClassDef) and n.name.endswith("Config")]
    fields = [field.target for c in configs for field in c.body if isinstance(field, ast.AnnAssign)]
    return {field.id for field in fields if isinstance(field, ast.Name)} - read


def test_every_config_field_is_read():
    assert unread_config_fields(SOURCES) == set()


def test_an_unread_config_field_would_be_found(tmp_path):
    file = tmp_path / "model.py"
    file.write_text("class FooConfig:\n    used: int\n    forgotten: int\n\nprint(x.used)\n")
    assert unread_config_fields([file]) == {"forgotten"}


def fails(node, error):
    """Whether this hands the error to somebody: waiting.fail(error)."""
    return (
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", None) == "fail"
        and error in [getattr(argument, "id", "") for argument in node.args]
    )


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_swallows_everything_or_unpickles(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            name = getattr(node.type, "id", None)
            broad = node.type is None or name in {"Exception", "BaseException", "ImportError"}
            passed_on = any(isinstance(i, ast.Raise) or fails(i, node.name) for i in ast.walk(node))
            assert passed_on or not broad, f"{relative(path)}:{node.lineno} swallows everything"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not modules & {"pickle", "marshal", "shelve"}, f"{relative(path)} unpickles"


def test_no_utils_module():
    assert not [f for f in ALL if f.stem in {"utils", "util", "helpers", "misc"}]


def test_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "pip install -e . && python scripts/generate.py" in text
    assert "pip install -e '.[test]' && pytest" in text


def test_ci_runs_the_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"pip install (--quiet )?-e '\.\[test\]' && pytest", script)
