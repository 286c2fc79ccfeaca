"""The API key, and what is counted."""

import openai
import pytest

from moe_jax.server import make_app
from tests.moe_jax.server.conftest import MODEL, serving
from tests.moe_jax.server.fake_engine import FakeEngine

KEY = "sk-kéy"


@pytest.fixture(scope="module")
def guarded():
    with serving(api_key=KEY) as running:
        yield running


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/nowhere"])
def test_nothing_without_the_key(guarded, header, path):
    headers = {} if header is None else {"authorization": header.encode()}
    reply = guarded.ask("GET", path, **headers)
    assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
    assert reply.error["code"] == "invalid_api_key"
    assert "Authorization: Bearer KEY" in reply.error["message"]


def test_two_keys_are_none(guarded):
    given = f"Bearer {KEY}".encode()
    reply = guarded.ask("GET", "/v1/models", Authorization=given, authorization=given)
    assert reply.status == 401


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_everything_with_the_key(guarded, scheme):
    reply = guarded.ask("GET", "/v1/models", authorization=f"{scheme} {KEY}".encode())
    assert reply.status == 200


def test_health_needs_no_key(guarded):
    assert guarded.ask("GET", "/health").status == 200


def test_the_client_is_refused_too(guarded):
    with guarded.client() as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


@pytest.mark.parametrize("key", ["", " ", "a\nb"])
def test_a_key_that_cannot_be_sent(key):
    with pytest.raises(ValueError, match="API key must be printable and not empty"):
        make_app(FakeEngine(), model="m", api_key=key)


def test_a_model_needs_a_name():
    with pytest.raises(ValueError, match="the model needs a name that clients ask for, got ''"):
        make_app(FakeEngine(), model="")


def test_models(served):
    with served.client() as client:
        (model,) = client.models.list().data
        assert model.id == client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
            client.models.retrieve("other")


def test_metrics():
    with serving(FakeEngine(pages=99)) as served:
        served.complete(prompt="a" * 20, n=2, max_tokens=3)
        served.chat(max_tokens=5, stream=True)
        served.complete(num_beams=2, n=2)
        served.complete(echo=True)
        served.ask("GET", "/v1/" + "x" * 100)
        found = served.counted()
    answers = 'moe_jax_requests_total{route="%s",status="%s"}'
    assert found[answers % ("/v1/completions", 200)] == 2
    assert found[answers % ("/v1/completions", 400)] == 1
    assert found[answers % ("/v1/chat/completions", 200)] == 1
    assert found[answers % ("other", 404)] == 1
    assert found["moe_jax_prompt_tokens_total"] == 20 + 20 + 3 + 3
    assert found["moe_jax_cached_prompt_tokens_total"] == 32
    assert found["moe_jax_generated_tokens_total"] == 3 + 3 + 5 + 12
    assert found["moe_jax_time_to_first_token_seconds_count"] == 2  # beams show only their end
    assert found["moe_jax_request_seconds_count"] == 3
    assert found["moe_jax_requests_running"] == found["moe_jax_requests_waiting"] == 0
    assert found["moe_jax_kv_pages_free"] == found["moe_jax_kv_pages"] == 99


def test_the_load_is_that_of_now():
    with serving(FakeEngine(pages=99, seats=1, seconds=0.02)) as served, served.client() as client:
        fields = {"model": MODEL, "prompt": "a" * 20, "max_tokens": 16, "stream": True}
        first, second = (client.completions.create(**fields, n=n) for n in (1, 2))
        # Not before one of the second's two samples has a token; the other one waits still.
        found = served.counted()
        assert found["moe_jax_requests_running"] == 1 and found["moe_jax_requests_waiting"] == 1
        assert found["moe_jax_kv_pages_free"] == 99 - 3
        first.close()
        second.close()
