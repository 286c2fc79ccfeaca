import dataclasses
import math

import numpy as np
import pytest

from moe_jax.decoding.sampling_params import SamplingParams, sampling_params


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
