"""/v1/completions through the official client, over a socket."""

import asyncio

import openai
import pytest

from tests.moe_jax.server.conftest import MODEL


@pytest.fixture
def create(served):
    with served.client() as client:
        yield lambda **fields: client.completions.create(**{"model": MODEL} | fields)


def test_a_text_is_continued(create):
    done = create(prompt="abcd", max_tokens=6, temperature=0)
    assert (done.object, done.model, done.id[:5]) == ("text_completion", MODEL, "cmpl-")
    assert [(c.index, c.text, c.finish_reason) for c in done.choices] == [(0, "abcdab", "length")]
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (4, 6)
    assert done.usage.total_tokens == 10
    assert done.choices[0].logprobs is None


def test_without_max_tokens_it_is_openais_sixteen(create):
    assert len(create(prompt="ab", temperature=0).choices[0].text) == 16


@pytest.mark.parametrize(
    "prompt, texts",
    [
        ("ab", ["aba"]),
        (["ab", "cd"], ["aba", "cdc"]),
        ([97, 98], ["aba"]),
        ([[97, 98], [99]], ["aba", "ccc"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_form_of_prompt(create, prompt, texts, stream):
    answer = create(prompt=prompt, max_tokens=3, temperature=0, stream=stream)
    got = dict.fromkeys(range(len(texts)), "")
    for part in answer if stream else [answer]:
        for choice in part.choices:
            got[choice.index] += choice.text
    assert list(got.values()) == texts


def test_samples_have_seeds_that_follow_each_other(create, served):
    done = create(prompt=["abcd", "efgh"], n=3, seed=2**32 - 1, max_tokens=2)
    texts = [choice.text for choice in sorted(done.choices, key=lambda choice: choice.index)]
    # The last seed plus one is 0, and each prompt begins with the same.
    assert texts == ["da", "ab", "bc", "he", "ef", "fg"]
    assert done.usage.prompt_tokens == 8 and done.usage.completion_tokens == 12


def test_without_a_seed_each_request_has_its_own(create, served):
    start = len(served.engine.calls)
    for _ in range(3):
        create(prompt="abcd", max_tokens=1)
    assert len({options["seed"] for _, options in served.engine.calls[start:]}) == 3


def test_stop_strings(create):
    choice = create(prompt="abcd", stop=["cd"], temperature=0, max_tokens=9).choices[0]
    assert (choice.text, choice.finish_reason) == ("abc", "stop")


def test_all_options_reach_the_engine(create, served):
    create(
        prompt="abc",
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"98": 2, "99": -100},
        stop="zz",
        seed=5,
        logprobs=3,
        user="somebody",
        extra_body={
            "min_p": 0.1,
            "top_k": 4,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "num_beams": 1,
            "ignore_eos": True,
            "priority": -3,
        },
    )
    assert served.engine.calls[-1] == (
        "abc",
        {
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "presence_penalty": 0.25,
            "frequency_penalty": -0.5,
            "logit_bias": {98: 2.0, 99: -100.0},
            "stop": ["zz"],
            "seed": 5,
            "logprobs": 3,
            "min_p": 0.1,
            "top_k": 4,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "num_beams": 1,
            "ignore_eos": True,
            "priority": -3,
        },
    )


@pytest.mark.parametrize("everything", [0, -1])
def test_other_words_for_no_top_k(create, served, everything):
    create(prompt="abc", max_tokens=1, extra_body={"top_k": everything})
    assert "top_k" not in served.engine.calls[-1][1]


def test_the_default_temperature_is_openais(create, served):
    create(prompt="abc", max_tokens=1, temperature=None)
    assert served.engine.calls[-1][1]["temperature"] == 1


def test_logprobs(create):
    done = create(prompt="ab", max_tokens=2, temperature=0, logprobs=2)
    chosen = done.choices[0].logprobs
    assert chosen.tokens == ["a", "b"]
    assert chosen.token_logprobs == [-0.5, -0.5]
    # Minus infinity, which JSON does not have, is -9999.
    assert chosen.top_logprobs == [{"a": -0.5, "`": -9999.0}, {"b": -0.5, "c": -9999.0}]
    assert chosen.text_offset == [0, 1]


def test_streamed_logprobs_are_those_of_each_token(create):
    parts = list(create(prompt="ab", max_tokens=3, temperature=0, logprobs=0, stream=True))
    chosen = [part.choices[0].logprobs for part in parts]
    assert [one.tokens for one in chosen] == [["a"], ["b"], ["a"]]
    assert [one.text_offset for one in chosen] == [[0], [1], [2]]
    assert chosen[0].top_logprobs == [{"a": -0.5}]


def test_a_stream_ends_with_its_reason_and_the_usage_if_asked_for(create):
    long = "abcdefghijklmnopq"
    fields = {"prompt": long, "max_tokens": 3, "temperature": 0, "stream": True}
    parts = list(create(**fields))
    assert [part.choices[0].text for part in parts] == ["a", "b", "c"]
    assert [part.choices[0].finish_reason for part in parts] == [None, None, "length"]
    assert len({part.id for part in parts}) == 1
    *parts, last = create(stream_options={"include_usage": True}, **fields)
    assert all(part.usage is None for part in parts) and last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (17, 3)
    assert last.usage.prompt_tokens_details.cached_tokens == 16


def test_beams_are_the_answers_of_one_search(create, served):
    done = create(prompt="abc", n=2, max_tokens=4, extra_body={"num_beams": 3})
    assert [choice.text for choice in done.choices] == ["beam 0", "beam 1"]
    options = {"num_beams": 3, "num_return": 2, "max_tokens": 4, "temperature": 0.0}
    assert served.engine.calls[-1] == ("abc", options)
    single = create(prompt="abc", extra_body={"num_beams": 2, "early_stopping": "never"})
    assert [choice.text for choice in single.choices] == ["beam 0"]
    assert single.usage.completion_tokens == 6


def test_many_streams_of_the_asynchronous_client(served):
    async def read(client, letter):
        stream = await client.completions.create(
            model=MODEL, prompt=letter, max_tokens=20, temperature=0, stream=True
        )
        return "".join([part.choices[0].text async for part in stream])

    async def read_all():
        async with served.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(read(client, letter) for letter in "abcdefghijkl"))

    assert asyncio.run(read_all()) == [letter * 20 for letter in "abcdefghijkl"]
