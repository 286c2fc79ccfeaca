import dataclasses
import math

import numpy as np
import pytest

from moe_jax.decoding.sampling_params import SamplingParams, check_vocab, sampling_params


def test_defaults_are_greedy():
    params = SamplingParams()
    assert (params.temperature, params.repetition_penalty, params.stop) == (0.0, 1.0, ())


def test_values_are_made_plain():
    params = sampling_params(
        max_tokens=np.int64(3), temperature=1, top_p=np.float32(0.5), seed=2**32 - 1, stop=["a"]
    )
    assert params == SamplingParams(
        max_tokens=3, temperature=1.0, top_p=0.5, seed=2**32 - 1, stop=("a",)
    )
    assert type(params.max_tokens) is int
    assert type(params.temperature) is float
    assert type(params.top_p) is float


def test_one_stop_string_alone():
    assert sampling_params(stop="ab").stop == ("ab",)


def test_biases_are_kept_as_sorted_pairs():
    given = {np.int64(7): 1, 3: np.float32(-0.5)}
    params = sampling_params(logit_bias=given)
    given.clear()
    assert params.logit_bias == ((3, -0.5), (7, 1.0))
    assert dataclasses.replace(params, seed=3).logit_bias == params.logit_bias
    assert hash(params) == hash(sampling_params(logit_bias={3: -0.5, 7: 1}))


def test_the_most_biases():
    assert len(sampling_params(logit_bias=dict.fromkeys(range(300), 1)).logit_bias) == 300


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "temperature",
            math.nan,
            r"temperature must be a number from 0 \(greedy\) to 1e6, got nan",
        ),
        ("temperature", -0.1, r"temperature must be .*got -0\.1"),
        ("temperature", math.inf, r"temperature must be .*got inf"),
        ("temperature", 10**400, r"temperature must be"),
        ("temperature", True, r"temperature must be a number .*got True"),
        ("temperature", "hot", r"temperature must be a number .*got 'hot'"),
        ("temperature", None, r"temperature must be a number .*got None"),
        ("top_p", 0, r"top_p must be a number above 0 and at most 1, got 0"),
        ("top_p", 1.01, r"top_p must be"),
        ("top_p", math.nan, r"top_p must be"),
        ("min_p", -0.01, r"min_p must be a number from 0 to 1, got -0\.01"),
        ("min_p", 2, r"min_p must be"),
        ("repetition_penalty", 0.0, r"repetition_penalty must be .*0\.001 to 1000, got 0\.0"),
        ("repetition_penalty", math.nan, r"repetition_penalty must be"),
        ("top_k", 0, r"top_k must be at least 1, got 0"),
        ("top_k", 2.0, r"top_k must be a whole number, got 2\.0"),
        ("max_tokens", 0, r"max_tokens must be at least 1, got 0"),
        ("max_tokens", None, r"max_tokens must be a whole number, got None"),
        ("max_tokens", True, r"max_tokens must be a whole number, got True"),
        ("seed", -1, r"seed must be in 0\.\.4294967295, got -1"),
        ("seed", 2**32, r"seed must be in 0\.\.4294967295"),
        ("stop", "", r"stop string 0 is empty"),
        ("stop", ["a", ""], r"stop string 1 is empty"),
        ("stop", ["a", 3], r"stop string 1 must be a string, got 3"),
        ("stop", 3, r"stop must be a string or a list of strings, got 3"),
        ("ignore_eos", 1, r"ignore_eos must be True or False, got 1"),
        ("min_tokens", -1, r"min_tokens must be at least 0, got -1"),
        ("presence_penalty", 2.1, r"presence_penalty must be a number from -2 to 2, got 2\.1"),
        ("frequency_penalty", math.nan, r"frequency_penalty must be .*-2 to 2, got nan"),
        ("logit_bias", [(3, 1.0)], r"logit_bias must be a mapping of token ids .*got \[\(3, 1\.0"),
        ("logit_bias", {"3": 1}, r"each token id of logit_bias must be a whole number, got '3'"),
        ("logit_bias", {-3: 1}, r"each token id of logit_bias must be at least 0, got -3"),
        ("logit_bias", {3: 101}, r"logit_bias of token 3 must be .*from -100 to 100, got 101"),
        ("logit_bias", {3: None}, r"logit_bias of token 3 must be a number .*got None"),
        (
            "logit_bias",
            dict.fromkeys(range(301), 1),
            r"logit_bias has 301 tokens, but at most 300 .*forbid many tokens with allowed_tokens",
        ),
        ("allowed_tokens", [1, 2], r"allowed_tokens must be a function of .*got \[1, 2\]"),
        ("logprobs", 21, r"logprobs must be in 0\.\.20, got 21"),
        ("logprobs", True, r"logprobs must be a whole number, got True"),
        ("num_beams", 0, r"num_beams must be at least 1, got 0"),
        ("num_return", 0, r"num_return must be at least 1, got 0"),
        ("length_penalty", 6, r"length_penalty must be a number from -5 to 5, got 6"),
        ("early_stopping", "always", r'must be True, False or "never", got \'always\''),
        ("early_stopping", 1, r'early_stopping must be True, False or "never", got 1'),
        ("prompt_lookup", 8, r"prompt_lookup must be in 0\.\.7, got 8"),
        ("priority", 0.5, r"priority must be a whole number, got 0\.5"),
    ],
)
def test_bad_values(name, value, text):
    with pytest.raises(ValueError, match=text):
        sampling_params(**{name: value})


def test_unknown_option():
    names = ", ".join(field.name for field in dataclasses.fields(SamplingParams))
    with pytest.raises(
        ValueError,
        match=f"unknown option 'temprature'; did you mean 'temperature'\\? the sampling .*{names}",
    ):
        sampling_params(temprature=1.0)
    with pytest.raises(ValueError, match=r"unknown option 'zzz'; the sampling options are"):
        sampling_params(zzz=1)


def test_biases_of_tokens_outside_the_vocabulary():
    params = sampling_params(logit_bias={9: 1, 10: 1, 11: -1})
    check_vocab(params, 12)
    with pytest.raises(
        ValueError,
        match=r"logit_bias names token 10, but .*has 10 tokens \(0 to 9\); remove it",
    ):
        check_vocab(params, 10)


@pytest.mark.parametrize(
    ("options", "plain", "counts"),
    [
        ({}, True, False),
        ({"logprobs": 3, "stop": "a", "top_p": 0.5, "prompt_lookup": 4}, True, False),
        ({"temperature": 0.5}, False, False),
        ({"repetition_penalty": 1.1}, False, True),
        ({"presence_penalty": -0.1}, False, True),
        ({"frequency_penalty": 0.1}, False, True),
        ({"logit_bias": {3: 1}}, False, False),
        ({"min_tokens": 1}, False, False),
        ({"allowed_tokens": lambda generated: None}, False, False),
    ],
)
def test_what_a_request_needs(options, plain, counts):
    params = sampling_params(**options)
    assert (params.plain_greedy, params.counts_tokens) == (plain, counts)
