"""/v1/chat/completions through the official client, over a socket."""

import pytest

from tests.moe_jax.server.conftest import MODEL


@pytest.fixture
def create(served):
    with served.client() as client:
        yield lambda **fields: client.chat.completions.create(**{"model": MODEL} | fields)


def user(content):
    return [{"role": "user", "content": content}]


def test_the_assistant_answers(create):
    done = create(messages=user("abc"), max_tokens=4, temperature=0)
    assert (done.object, done.id[:9]) == ("chat.completion", "chatcmpl-")
    choice = done.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "abca")
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 4)


def test_the_engine_gets_the_messages(create, served):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    create(messages=[{"role": "system", "content": "Be brief."}, *user(parts)], max_tokens=1)
    assert served.engine.calls[-1][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo"},
    ]


@pytest.mark.parametrize(
    "fields, tokens", [({}, 512), ({"max_tokens": 3}, 3), ({"max_completion_tokens": 5}, 5)]
)
def test_how_long_an_answer_may_be(create, fields, tokens):
    done = create(messages=user("abc"), **fields)
    assert done.usage.completion_tokens == tokens


def test_a_stream_names_the_role_first(create):
    *parts, last = create(
        messages=user("abc"),
        n=2,
        seed=0,
        max_tokens=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert parts[0].object == "chat.completion.chunk"
    openings = [part.choices[0] for part in parts[:2]]
    assert [(c.index, c.delta.role, c.delta.content) for c in openings] == [
        (0, "assistant", ""),
        (1, "assistant", ""),
    ]
    texts = {0: "", 1: ""}
    for part in parts[2:]:
        texts[part.choices[0].index] += part.choices[0].delta.content
    assert texts == {0: "ab", 1: "bc"}
    assert sorted(c.finish_reason or "" for p in parts for c in p.choices)[-2:] == ["length"] * 2
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 4)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(create, stream):
    answer = create(
        messages=user("aé"),
        max_tokens=2,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        stream=stream,
    )
    choices = [choice for part in (answer if stream else [answer]) for choice in part.choices]
    entries = [entry for c in choices if c.logprobs is not None for entry in c.logprobs.content]
    assert [(entry.token, entry.logprob) for entry in entries] == [("a", -0.5), ("\ufffd", -0.5)]
    assert entries[0].bytes == [97]
    assert entries[1].bytes is None  # half a character
    likely = [(top.token, top.logprob) for top in entries[0].top_logprobs]
    assert likely == [("a", -0.5), ("`", -9999.0)]


def test_logprobs_without_alternatives(create, served):
    done = create(messages=user("ab"), max_tokens=1, logprobs=True)
    assert done.choices[0].logprobs.content[0].top_logprobs == []
    assert "logprobs" not in served.engine.calls[-1][1]
