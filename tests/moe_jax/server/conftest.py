"""Servers on a real socket, each with an engine of its own."""

import contextlib
import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from moe_jax.server import GracefulServer, Limits, make_app, make_server
from tests.moe_jax.server.fake_engine import FakeEngine

MODEL = "org/fake-model"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


@dataclass(frozen=True)
class Served:
    """A server that runs, and ways to reach it."""

    engine: Any
    server: GracefulServer
    service: Any
    port: int

    def client(self, kind=openai.OpenAI, **options):
        options = {"api_key": "none", "max_retries": 0, "timeout": 20} | options
        return kind(base_url=f"http://127.0.0.1:{self.port}/v1", **options)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request without a client library; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            if body is not None:
                sent = {"content-type": "application/json"} | sent
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers, answer.read())

    def complete(self, **fields: Any) -> Reply:
        """POST /v1/completions."""
        return self.ask("POST", "/v1/completions", {"model": MODEL, "prompt": "abc"} | fields)

    def chat(self, **fields: Any) -> Reply:
        """POST /v1/chat/completions."""
        messages = [{"role": "user", "content": "abc"}]
        fields = {"model": MODEL, "messages": messages} | fields
        return self.ask("POST", "/v1/chat/completions", fields)

    def counted(self) -> dict[str, float]:
        """The server's metrics."""
        reply = self.ask("GET", "/metrics")
        assert reply.headers["content-type"].startswith("text/plain")
        lines = [line for line in reply.body.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def wait_until(self, condition, seconds: float = 5.0) -> None:
        """Until the engine's load, say, is as expected."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.002)

    def send(self, path: str, **fields: Any) -> socket.socket:
        """A request over a connection that is the caller's to close, or not to read."""
        body = json.dumps({"model": MODEL} | fields).encode()
        connection = socket.socket()
        connection.settimeout(20)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", self.port))
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def idle(self) -> bool:
        load = self.engine.load_now
        return load.running == load.waiting == 0 and load.free_pages == load.pages


@contextlib.contextmanager
def serving(engine=None, *, api_key=None, send_buffer=None, **limits):
    """Runs a server; at the end it must stop, and nothing of its engine may be in use."""
    engine = FakeEngine() if engine is None else engine
    app = make_app(engine, model=MODEL, api_key=api_key, limits=Limits(**limits))
    ready = threading.Event()
    server = make_server(app, port=0, on_ready=ready.set, log_config=None, log_level="critical")
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    served = Served(engine, server, app.state.service, listener.getsockname()[1])
    try:
        assert ready.wait(20)
        yield served
        served.wait_until(served.idle)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="module")
def served():
    with serving() as running:
        yield running
