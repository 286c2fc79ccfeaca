"""What cannot be answered: the status, OpenAI's form, and a text that says what to do."""

import json

import openai
import pytest

from tests.moe_jax.server.conftest import MODEL


@pytest.mark.parametrize(
    "fields, param, text",
    [
        ({"best_of": 3}, "best_of", "best_of is not supported: ask for n samples and choose"),
        ({"echo": True}, "echo", "echo is not supported: the prompt is not repeated"),
        ({"suffix": "end"}, "suffix", "suffix is not supported: models here only continue"),
        ({"store": True}, "store", "store is not supported: this server stores nothing"),
        ({"service_tier": "flex"}, "service_tier", "use priority"),
        ({"beam_width": 3}, "beam_width", "unknown field 'beam_width'; remove it"),
        ({"beam_width": None}, "beam_width", "unknown field 'beam_width'; remove it"),
        ({"prompt": None}, "prompt", "prompt: give a text, a list of token ids, or a list of"),
        ({"prompt": []}, "prompt", "prompt: give a text, a list of token ids, or a list of"),
        ({"prompt": ["a", 1]}, "prompt", "no mixture, got ['a', 1]"),
        ({"prompt": [[1], "a"]}, "prompt", "no mixture"),
        ({"prompt": [True]}, "prompt", "no mixture, got [True]"),
        ({"prompt": [[1, 2.5]]}, "prompt", "no mixture, got [[1, 2.5]]"),
        ({"prompt": ""}, None, "the prompt is empty; give at least one token"),
        ({"prompt": [300]}, None, "outside the vocabulary of 256 tokens"),
        ({"prompt": ["a"] * 65}, "prompt", "prompt must ask for 1 to 64, got 65"),
        ({"max_tokens": "many"}, "max_tokens", "should be a valid integer, got 'many'"),
        ({"max_tokens": 2.5}, "max_tokens", "should be a valid integer, got 2.5"),
        ({"max_tokens": True}, "max_tokens", "should be a valid integer, got True"),
        ({"max_tokens": 0}, None, "max_tokens must be at least 1, got 0"),
        ({"temperature": "hot"}, "temperature", "should be a valid number, got 'hot'"),
        ({"temperature": -1}, None, "temperature must be a number from 0 (greedy) to 1e6, got -1"),
        ({"top_p": 0}, None, "top_p must be a number above 0 and at most 1"),
        ({"logprobs": 21}, None, "logprobs must be in 0..20, got 21"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "got the key 'x'"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "got the key '-1'"),
        ({"logit_bias": {"1": "a"}}, "logit_bias.1", "should be a valid number, got 'a'"),
        ({"logit_bias": {"1": 101}}, None, "-100 to 100"),
        ({"stop": [1]}, "stop.0", "stop.0: input should be a valid string, got 1"),
        ({"stop": ""}, None, "stop string 0 is empty"),
        ({"early_stopping": 1}, "early_stopping", "early_stopping: input should be"),
        ({"seed": -1}, "seed", "seed must be in 0..4294967295, got -1"),
        ({"n": 0}, "n", "n must ask for 1 to 16, got 0"),
        ({"n": 17}, "n", "n must ask for 1 to 16, got 17"),
        ({"prompt": ["a"] * 32, "n": 16}, None, "512 sequences (prompts times n), and the server"),
        ({"stream": "yes"}, "stream", "should be a valid boolean, got 'yes'"),
        ({"stream_options": {}}, "stream_options", "stream_options needs stream to be true"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "events are not padded here",
        ),
        ({"num_beams": 2, "stream": True}, "stream", "num_beams above 1 cannot be streamed"),
        ({"num_beams": 2, "logprobs": 0}, "logprobs", "logprobs are not given for beams"),
        ({"num_beams": 2, "temperature": 1}, None, "num_beams=2 ranks whole texts"),
        ({"num_beams": 2, "n": 3}, None, "num_return=3 is more than num_beams=2"),
    ],
)
def test_completions(served, fields, param, text):
    reply = served.complete(**fields)
    assert reply.status == 400
    error = reply.error
    assert text in error["message"] and error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields, param, text",
    [
        ({"messages": None}, "messages", "messages: input should be a valid list, got None"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": ["hello"]}, "messages.0", "messages.0: input should be"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "'messages.0.content' is missing"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages.0.content",
            "give a text or a list of text parts, got None",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
            "only parts of type 'text' are supported, not 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages.0.content.0.text",
            "should be a valid string, got 1",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages.0.tool_calls",
            "messages.0.tool_calls is not supported: this server calls no tools",
        ),
        (
            {"messages": [{"role": "tool", "content": "4", "tool_call_id": "x"}]},
            "messages.0.tool_call_id",
            "this server calls no tools",
        ),
        (
            {"tools": [{"type": "function"}]},
            "tools",
            "tools is not supported: this server calls no",
        ),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice is not supported"),
        ({"functions": [{}]}, "functions", "functions is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "answers are free text"),
        ({"modalities": ["text", "audio"]}, "modalities", "takes and gives text only"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "reasoning_effort is not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs to be true"),
        ({"logprobs": 1}, "logprobs", "should be a valid boolean, got 1"),
        (
            {"max_tokens": 1, "max_completion_tokens": 2},
            "max_tokens",
            "max_tokens is 1 and max_completion_tokens is 2; they mean the same",
        ),
        ({"prompt": "a"}, "prompt", "unknown field 'prompt'"),
    ],
)
def test_chat(served, fields, param, text):
    reply = served.chat(**fields)
    assert reply.status == 400
    assert text in reply.error["message"] and reply.error["param"] == param


def test_fields_that_ask_for_nothing_are_taken(served):
    completion = {"best_of": 1, "echo": False, "suffix": None, "store": False}
    assert served.complete(**completion, service_tier="auto", max_tokens=1).status == 200
    chat = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "n": None}
    chat |= {"response_format": {"type": "text"}, "modalities": ["text"], "metadata": {"a": "b"}}
    messages = [{"role": "assistant", "content": "a", "tool_calls": None, "refusal": None}]
    assert served.chat(**chat, messages=messages, max_tokens=1).status == 200


def test_every_mistake_is_named(served):
    message = served.complete(n="x", seed="y", colour="z").error["message"]
    assert all(name in message for name in ("n:", "seed:", "'colour'"))


@pytest.mark.parametrize(
    "body, text",
    [
        (b"", "not valid JSON"),
        (b'{"model":', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"temperature": NaN}', "NaN is not a JSON number"),
        (b'{"temperature": -Infinity}', "-Infinity is not a JSON number"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"temperature": 1e999, "model": "m", "prompt": "a"}', "should be a finite number"),
        (b"[1, 2]", "the body must be a JSON object, got a list"),
        (b"null", "the body must be a JSON object, got a NoneType"),
        (b"{}", "the field 'model' is missing; the field 'prompt' is missing"),
    ],
)
def test_what_is_no_request_at_all(served, body, text):
    reply = served.ask("POST", "/v1/completions", body)
    assert reply.status == 400 and text in reply.error["message"]


def test_a_surrogate_without_its_other_half(served):
    body = json.dumps({"model": MODEL, "prompt": "\ud800"}).encode()
    reply = served.ask("POST", "/v1/completions", body)
    assert reply.status == 400 and "utf-8" in reply.error["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types(served, kind):
    reply = served.ask("POST", "/v1/completions", b"{}", content_type=kind)
    assert reply.status == 415 and "application/json" in reply.error["message"]


def test_paths_methods_and_models_that_are_not_there(served):
    reply = served.ask("GET", "/v2/everything")
    assert reply.status == 404 and "there is nothing at /v2/everything" in reply.error["message"]
    assert served.ask("POST", "/v1/completions/", {}).status == 404
    reply = served.ask("GET", "/v1/completions")
    assert reply.status == 405 and reply.headers["allow"] == "POST"
    assert "does not take GET" in reply.error["message"]
    reply = served.complete(model="gpt-0")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert f"no model 'gpt-0' here; this server has '{MODEL}'" in reply.error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields, kind",
    [
        ({"prompt": "", "model": MODEL}, openai.BadRequestError),
        ({"prompt": ["ab", ""], "model": MODEL}, openai.BadRequestError),
        ({"prompt": "a", "model": "other"}, openai.NotFoundError),
    ],
)
def test_the_client_raises_what_it_should(served, fields, kind, stream):
    """In a stream too: the engine's refusal comes before the answer has begun."""
    with served.client() as client, pytest.raises(kind):
        client.completions.create(**fields, stream=stream)


def test_an_error_of_the_engine_is_not_shown_to_clients(served):
    """It makes the server unwell until something succeeds again."""
    reply = served.complete(prompt="boom", temperature=0)
    assert reply.status == 500 and reply.error["type"] == "server_error"
    assert "RuntimeError" in reply.error["message"] and "secret" not in str(reply.body)
    assert served.ask("GET", "/health").status == 503
    assert served.complete(prompt="fine").status == 200
    assert served.ask("GET", "/health").status == 200


@pytest.mark.parametrize("prompt", ["boom", ["boom", "fine"]])
def test_an_error_in_a_stream_is_its_last_event(served, prompt):
    with served.client() as client, pytest.raises(openai.APIError, match="the server failed"):
        stream = client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, stream=True, max_tokens=9
        )
        for part in stream:
            assert part.choices[0].text
    served.wait_until(served.idle)


def test_a_request_that_the_engine_cancels_is_an_error(served):
    assert served.complete(prompt="halt", temperature=0).status == 500
