"""Clients that leave, or no longer read: their requests end at once."""

import socket
import struct
import time

import pytest

from tests.moe_jax.server.conftest import MODEL, serving
from tests.moe_jax.server.fake_engine import FakeEngine

ROUTES = {
    "/v1/completions": {"prompt": "abc"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "abc"}]},
}


@pytest.fixture(scope="module")
def slow():
    """A token each 2 ms; a request that is not cancelled would run for twenty minutes."""
    with serving(FakeEngine(pages=400_000, seats=4, seconds=0.002)) as running:
        yield running


def leave(connection: socket.socket, rudely: bool) -> None:
    if rudely:  # with a reset, and not with a farewell
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("rudely", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", ROUTES)
def test_a_client_that_leaves(slow, path, n, stream, rudely):
    before = slow.engine.cancelled
    fields = ROUTES[path] | {"n": n, "stream": stream, "max_tokens": 600_000}
    connection = slow.send(path, **fields)
    slow.wait_until(lambda: slow.engine.load_now.running == n)
    if stream:
        assert b"data: " in connection.recv(1000)
    leave(connection, rudely)
    start = time.monotonic()
    slow.wait_until(slow.idle)
    assert time.monotonic() - start < 1
    assert slow.engine.cancelled == before + n


def test_a_client_that_leaves_while_it_waits(slow):
    fields = {"prompt": "abc", "max_tokens": 600_000}
    running = slow.send("/v1/completions", n=4, **fields)
    slow.wait_until(lambda: slow.engine.load_now.running == 4)
    waiting = slow.send("/v1/completions", n=2, stream=True, **fields)
    slow.wait_until(lambda: slow.engine.load_now.waiting == 2)
    leave(waiting, rudely=False)
    slow.wait_until(lambda: slow.engine.load_now.waiting == 0)
    assert slow.engine.load_now.running == 4
    leave(running, rudely=False)
    slow.wait_until(slow.idle)


def test_the_official_client_can_leave(slow):
    with slow.client() as client:
        stream = client.completions.create(model=MODEL, prompt="a", max_tokens=600_000, stream=True)
        assert next(stream).choices[0].text == "a"
        stream.close()
        slow.wait_until(slow.idle)


def test_vanished_clients_are_counted():
    with serving(FakeEngine(seconds=0.002)) as served:
        leave(served.send("/v1/completions", prompt="abc", max_tokens=9999), rudely=True)
        gone = 'moe_jax_requests_total{route="/v1/completions",status="499"}'
        served.wait_until(lambda: served.counted().get(gone) == 1)
        assert served.counted()["moe_jax_clients_vanished_total"] == 1


def test_a_client_that_does_not_read_is_left():
    fields = {"prompt": "abc", "max_tokens": 60_000, "stream": True, "n": 4, "logprobs": 3}
    with serving(send_buffer=4096, send_seconds=0.2) as served:
        connection = served.send("/v1/completions", **fields)
        served.wait_until(lambda: served.engine.load_now.running == 4)
        served.wait_until(served.idle)
        assert served.engine.cancelled == 4
        connection.close()
