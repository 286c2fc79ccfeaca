"""scripts/serve.py as a user runs it: the embedded model behind a socket, until a signal."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
KEY = "sk-test"
MODEL = "reference_model"


@pytest.fixture(scope="module")
def process():
    """A server that the last test stops."""
    command = [sys.executable, str(SCRIPTS / "serve.py"), "--port", "0"]
    command += ["--device-memory", "1GiB", "--capacity", "512", "--max-seqs", "1"]
    environment = os.environ | {"MOE_JAX_API_KEY": KEY}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        yield running
        running.kill()


@pytest.fixture(scope="module")
def url(process):
    for line in process.stdout:
        if " is served at " in line:
            return line.split()[-1]
    raise AssertionError("the server did not start")


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def test_it_answers(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    fields = {"model": MODEL, "prompt": "def add(a, b):", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**fields)
    assert whole.usage.completion_tokens == 12 and whole.choices[0].text
    stream = client.completions.create(**fields, stream=True)
    assert "".join(part.choices[0].text for part in stream) == whole.choices[0].text


def test_the_key_is_that_of_the_environment(url):
    with (
        openai.OpenAI(base_url=url, api_key="guess", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_a_signal_lets_a_stream_finish(client, process):
    stream = client.completions.create(
        model=MODEL,
        prompt="import os",
        max_tokens=100,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    next(stream)
    process.send_signal(signal.SIGTERM)
    *_, last = stream
    assert last.usage.completion_tokens == 100
    assert process.wait(30) == 0


def test_an_address_that_is_taken():
    """It is refused before a model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, str(SCRIPTS / "serve.py"), "--port", str(port), "--model", "no"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"error: cannot listen at 127.0.0.1 port {port}" in done.stderr


def test_without_the_extra():
    code = "import runpy, sys; sys.modules['uvicorn'] = None; runpy.run_path('serve.py')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=SCRIPTS, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "error: uvicorn is not installed; pip install 'moe-jax[serve]'" in done.stderr
