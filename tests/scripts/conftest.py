"""Scripts run from a shell, as the README shows them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script by its name and waits for its end."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(Path(__file__).parents[2] / "scripts" / name), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    return run
