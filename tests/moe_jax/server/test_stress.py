"""Many streams at once, some of which are abandoned: scripts/stress_server.py in a short form."""

import os
import subprocess
import sys
from pathlib import Path

from tests.moe_jax.server.conftest import serving
from tests.moe_jax.server.fake_engine import FakeEngine

SCRIPT = Path(__file__).parents[3] / "scripts" / "stress_server.py"
SECONDS = os.environ.get("MOE_JAX_STRESS_SECONDS", "2")


def stress(served, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--url", f"http://127.0.0.1:{served.port}/v1"]
    command += ["--warm-up", "0.5", "--seconds", SECONDS, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_64_streams_at_once():
    with serving(FakeEngine(seats=16, seconds=0.001)) as served:
        done = stress(served)
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        assert served.engine.cancelled > 0


def test_errors_are_reported():
    with serving(sequences=20) as served:
        done = stress(served, "--streams", "40", "--seconds", "0.3")
    assert done.returncode == 1 and "RateLimitError" in done.stderr
