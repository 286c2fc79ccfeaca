"""Bodies that are too big or too slow, and more requests than there is room for."""

import http.client
import json
import math
import socket
import time

import openai
import pytest

from moe_jax.server import Limits
from tests.moe_jax.server.conftest import MODEL, serving
from tests.moe_jax.server.fake_engine import FakeEngine

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def strict():
    with serving(body_bytes=2000, body_seconds=0.2) as running:
        yield running


def answer(connection: socket.socket) -> tuple[int, dict]:
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    return reply.status, json.loads(reply.read())["error"]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@pytest.mark.parametrize("size, status", [(1800, 200), (2000, 413), (100_000, 413)])
def test_a_big_body(strict, size, status):
    reply = strict.complete(prompt="a" * size, max_tokens=1)
    assert reply.status == status
    if status == 413:
        assert "the body is larger than 2000 bytes" in reply.error["message"]


def test_a_big_body_without_an_announced_length(strict):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(5):
            connection.sendall(chunk(b" " * 500))
        connection.sendall(b"0\r\n\r\n")
        assert answer(connection)[0] == 413


def test_a_client_that_asks_first_need_not_send_it(strict):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:
        connection.sendall(HEAD + b"content-length: 9999\r\nexpect: 100-continue\r\n\r\n")
        assert answer(connection)[0] == 413


def test_a_body_that_never_ends_is_not_read_for_ever(served):
    """It is cut off long before there is no more time for it."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(100):
                connection.sendall(chunk(b" " * (1 << 20)))


def test_a_slow_body(strict):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:
        connection.sendall(HEAD + b"content-length: 1000\r\n\r\n{")
        status, error = answer(connection)
    assert status == 408 and "did not arrive within 0.2 seconds" in error["message"]


def test_a_body_that_trickles_is_slow_too(strict):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:
        connection.sendall(HEAD + b"content-length: 1000\r\n\r\n{")
        with pytest.raises(OSError):  # it is cut off
            for _ in range(500):
                time.sleep(0.005)
                connection.sendall(b" ")


def test_a_client_that_leaves_within_its_body(strict):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:
        connection.sendall(HEAD + b"content-length: 1000\r\n\r\n{")
    gone = 'moe_jax_requests_total{route="/v1/completions",status="499"}'
    strict.wait_until(lambda: strict.counted().get(gone) == 1)


def test_what_is_not_http(strict):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_more_sequences_than_there_is_room_for():
    """Those that run are not disturbed, and there is room again when they are done."""
    with serving(FakeEngine(seconds=0.01), sequences=4) as served, served.client() as client:
        fields = {"model": MODEL, "prompt": "abc", "temperature": 0, "stream": True}
        running = client.completions.create(**fields, n=3, max_tokens=20)
        reply = served.complete(n=2)
        assert reply.status == 429 and reply.headers["retry-after"] == "1"
        assert reply.error["type"] == "rate_limit_error"
        text = "the server is full: 3 of 4 sequences are running or waiting, and this request asks"
        assert text in reply.error["message"]
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**fields, n=2)
        assert served.complete(n=1).status == 200
        assert sum(len(part.choices[0].text) for part in running) == 60
        assert served.complete(n=4).status == 200
        assert served.complete(n=5).status == 400  # there will never be room


def test_more_connections_than_there_is_room_for():
    with serving(connections=3) as served:
        idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(3)]
        served.wait_until(lambda: served.ask("GET", "/health").status == 503)
        for connection in idle:
            connection.close()
        served.wait_until(lambda: served.ask("GET", "/health").status == 200)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_limits_that_mean_nothing(value):
    with pytest.raises(ValueError, match="body_seconds must be a finite number above 0, got"):
        Limits(body_seconds=value)
