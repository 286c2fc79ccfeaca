"""A server that is told to stop: nothing new, and what runs may finish, up to a limit."""

import json
import socket
import time

import openai
import pytest

from tests.moe_jax.server.conftest import MODEL, serving
from tests.moe_jax.server.fake_engine import FakeEngine

FIELDS = {"model": MODEL, "prompt": "abc", "temperature": 0, "stream": True}


def test_running_streams_finish():
    with serving(FakeEngine(seconds=0.01)) as served, served.client() as client:
        stream = client.completions.create(**FIELDS, max_tokens=50)
        first = next(stream).choices[0].text
        served.server.should_exit = True
        served.wait_until(lambda: served.service.gate.closed)
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", served.port), timeout=5).close()
        rest = "".join(part.choices[0].text for part in stream)
        assert len(first + rest) == 50 and served.engine.cancelled == 0


def test_streams_that_take_too_long_are_cut_off_with_an_error():
    engine = FakeEngine(seconds=0.01)
    with serving(engine, drain_seconds=0.2) as served, served.client() as client:
        stream = client.completions.create(**FIELDS, max_tokens=10_000)
        served.server.should_exit = True
        start = time.monotonic()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        assert time.monotonic() - start < 2
    assert engine.cancelled == 1


def test_an_answer_that_takes_too_long_is_an_error():
    with serving(FakeEngine(seconds=0.01), drain_seconds=0.2) as served:
        connection = served.send("/v1/completions", prompt="abc", max_tokens=10_000)
        served.wait_until(lambda: served.engine.load_now.running == 1)
        served.server.should_exit = True
        reply = connection.recv(10_000)
        connection.close()
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503")
    assert json.loads(body)["error"]["code"] == "shutting_down"


def test_new_requests_are_refused():
    with serving() as served, served.client() as client:
        assert served.ask("GET", "/health").body == b'{"status":"ready"}'
        served.service.gate.closed = True
        reply = served.ask("GET", "/health")
        assert (reply.status, reply.body) == (503, b'{"status":"shutting down"}')
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            client.completions.create(**FIELDS)
        assert caught.value.status_code == 503


def test_connections_that_do_nothing_do_not_keep_it():
    with serving() as served:
        idle = socket.create_connection(("127.0.0.1", served.port))
        half = socket.create_connection(("127.0.0.1", served.port))
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost:")
        served.wait_until(lambda: len(served.server.server_state.connections) == 2)
        start = time.monotonic()
    assert time.monotonic() - start < 2
    idle.close()
    half.close()
