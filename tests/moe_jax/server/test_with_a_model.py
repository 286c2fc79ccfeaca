"""The server around a real engine: what clients read is what the engine would say."""

import openai
import pytest

import moe_jax
from tests.moe_jax.server.conftest import MODEL, serving

PROMPT = "one mixture of many"


@pytest.fixture(scope="module")
def engine(tiny):
    return moe_jax.load(tiny, dtype="float32", max_tokens=512, max_seqs=2, progress=False)


@pytest.fixture(scope="module")
def served(engine):
    with serving(engine) as running:
        yield running


@pytest.fixture
def create(served):
    with served.client() as client:
        yield lambda **fields: client.completions.create(
            **{"model": MODEL, "prompt": PROMPT, "max_tokens": 10} | fields
        )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_samples_are_those_of_the_engine(engine, create, stream, temperature):
    options = {"max_tokens": 10, "temperature": temperature, "top_p": 0.9}
    expected = {n: engine.generate(PROMPT, seed=5 + n, **options).text for n in range(2)}
    answer = create(**options, seed=5, n=2, stream=stream)
    texts = {0: "", 1: ""}
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == expected


def test_logprobs_are_those_of_the_engine(engine, create):
    expected = engine.generate(PROMPT, max_tokens=4)
    chosen = create(temperature=0, max_tokens=4, logprobs=3).choices[0].logprobs
    assert chosen.token_logprobs == pytest.approx(expected.logprobs)
    assert "".join(chosen.tokens) == expected.text
    for token, logprob, top in zip(
        chosen.tokens, chosen.token_logprobs, chosen.top_logprobs, strict=True
    ):
        assert len(top) == 3 and top[token] == pytest.approx(logprob) == max(top.values())


def test_beams_are_those_of_the_engine(engine, create):
    expected = engine.generate(PROMPT, max_tokens=6, num_beams=2, num_return=2)
    done = create(max_tokens=6, n=2, extra_body={"num_beams": 2})
    assert [choice.text for choice in done.choices] == [one.text for one in expected]


def test_chats_go_through_the_models_template(engine, served):
    messages = [{"role": "user", "content": "some of them"}]
    expected = engine.generate(messages, max_tokens=6)
    assert expected.text == engine.generate("user: some of them\nassistant:", max_tokens=6).text
    with served.client() as client:
        done = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=6, temperature=0
        )
    assert done.choices[0].message.content == expected.text
    assert done.usage.prompt_tokens == expected.prompt_tokens


def test_usage_says_what_was_cached(engine, create):
    tokens = list(range(20, 40))
    usages = [create(prompt=tokens, max_tokens=1).usage for _ in range(2)]
    assert [usage.prompt_tokens for usage in usages] == [20, 20]
    assert [usage.prompt_tokens_details.cached_tokens for usage in usages] == [0, 16]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_pages_back(served, stream):
    fields = {"prompt": PROMPT, "max_tokens": 450, "stream": stream, "ignore_eos": True}
    before = served.counted()["moe_jax_generated_tokens_total"]
    connection = served.send("/v1/completions", **fields)
    served.wait_until(lambda: served.engine.load_now.running == 1)
    if stream:
        assert b"data: " in connection.recv(1000)
    connection.close()
    served.wait_until(served.idle)
    assert served.counted()["moe_jax_generated_tokens_total"] - before < 300


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"prompt": [1] * 513}, "longer than max_tokens=512"),
        ({"prompt": [10**6]}, "outside the vocabulary"),
        ({"prompt": "a", "logit_bias": {str(10**6): 1}}, "1000000"),
    ],
)
def test_the_engines_refusals_reach_the_client(served, fields, text):
    reply = served.complete(**fields)
    assert reply.status == 400 and text in reply.error["message"]


def test_more_streams_than_seats(served, engine):
    expected = {
        prompt: one.text
        for prompt, one in zip(
            "abcdefgh", engine.generate(list("abcdefgh"), max_tokens=8), strict=True
        )
    }
    with served.client(openai.OpenAI) as client:
        fields = {"model": MODEL, "max_tokens": 8, "temperature": 0, "stream": True}
        streams = {
            prompt: client.completions.create(prompt=prompt, **fields) for prompt in "abcdefgh"
        }
        texts = {
            prompt: "".join(part.choices[0].text for part in stream)
            for prompt, stream in streams.items()
        }
    assert texts == expected
