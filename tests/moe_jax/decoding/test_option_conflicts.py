import pytest

from moe_jax.decoding.sampling_params import sampling_params


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("num_beam_groups", r"diverse beam search is not built; use num_beams with num_return"),
        ("diversity_penalty", r"diverse beam search is not built"),
        ("constraints", r"constrained beam search is not built; use allowed_tokens without beams"),
        ("force_words_ids", r"constrained beam search is not built"),
    ],
)
def test_options_refused_by_name(name, text):
    with pytest.raises(ValueError, match=f"{name} is not supported: {text}"):
        sampling_params(num_beams=4, **{name: 2})


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_return": 4, "length_penalty": -1, "early_stopping": "never"},
        {"num_beams": 2, "repetition_penalty": 1.2, "min_tokens": 3, "ignore_eos": True},
        {"prompt_lookup": 5, "logprobs": 5, "stop": ["a"], "max_tokens": 1},
        {"min_tokens": 9, "max_tokens": 9, "temperature": 1, "top_k": 3, "logit_bias": {3: 1}},
    ],
)
def test_these_go_together(options):
    params = sampling_params(**options)
    kept = {**options}
    if "logit_bias" in kept:
        kept["logit_bias"] = ((3, 1.0),)
    if "stop" in kept:
        kept["stop"] = ("a",)
    assert {name: getattr(params, name) for name in kept} == kept


VALUES = {
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {3: 1},
    "allowed_tokens": lambda generated: [1],
    "logprobs": 2,
    "stop": "a",
    "prompt_lookup": 3,
    "min_tokens": 2,
    "length_penalty": 0.5,
    "early_stopping": True,
}


@pytest.mark.parametrize(
    "name",
    [
        *("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty"),
        *("logit_bias", "allowed_tokens", "logprobs", "stop", "prompt_lookup"),
    ],
)
def test_not_with_beams(name):
    with pytest.raises(
        ValueError,
        match=f"num_beams=2 ranks whole texts .*cannot be combined with {name}; "
        "leave that out, or set num_beams=1",
    ):
        sampling_params(num_beams=2, **{name: VALUES[name]})


@pytest.mark.parametrize("name", ["length_penalty", "early_stopping"])
def test_only_with_beams(name):
    with pytest.raises(
        ValueError,
        match=f"num_beams=1 has no texts to rank, so it cannot be combined with {name}; "
        "leave that out, or set num_beams above 1",
    ):
        sampling_params(**{name: VALUES[name]})


@pytest.mark.parametrize(
    "name",
    [
        *("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("logit_bias", "allowed_tokens", "min_tokens"),
    ],
)
def test_not_with_prompt_lookup(name):
    with pytest.raises(
        ValueError,
        match=f"prompt_lookup=3 compares drafts .*cannot be combined with {name}; "
        "leave that out, or set prompt_lookup=0",
    ):
        sampling_params(prompt_lookup=3, **{name: VALUES[name]})


def test_all_that_is_wrong_is_named():
    with pytest.raises(ValueError, match="combined with temperature, top_k, stop; leave"):
        sampling_params(num_beams=2, stop="a", top_k=3, temperature=1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"min_tokens": 9, "max_tokens": 8},
            "min_tokens=9 is more than max_tokens=8; raise max_tokens or lower min_tokens",
        ),
        (
            {"num_return": 3, "num_beams": 2},
            "num_return=3 is more than num_beams=2; raise num_beams, or give the prompt several",
        ),
        ({"num_return": 2}, "num_return=2 is more than num_beams=1"),
    ],
)
def test_numbers_that_contradict_each_other(options, text):
    with pytest.raises(ValueError, match=text):
        sampling_params(**options)
