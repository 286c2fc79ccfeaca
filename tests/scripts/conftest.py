"""Scripts run as from a shell, but in this process, which has jax and has compiled programs."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.calibrations import known_costs  # noqa: F401

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., CompletedProcess]:
    """Runs a script by its name: its arguments, its exit code, and what it printed."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(name: str, *arguments: str) -> CompletedProcess:
        command = [str(SCRIPTS / name), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        code = None
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
        if isinstance(code, str):  # what the interpreter does with a message
            print(code, file=sys.stderr)
            code = 1
        return CompletedProcess(command, code or 0, *capsys.readouterr())

    return run
