import math

import pytest

from moe_jax.config import RopeConfig
from moe_jax.families.fields import FieldReader
from moe_jax.families.rope import read_rope

HEAD_DIM = 8
MAX_POSITIONS = 128
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2, 3, 4, 5]}
YARN = {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


def read(**raw) -> RopeConfig:
    return read_rope(FieldReader(raw, "config.json: "), HEAD_DIM, MAX_POSITIONS, 777.0)


@pytest.mark.parametrize("raw", [{}, {"rope_scaling": None}, {"rope_parameters": {}}])
def test_nothing_said_means_the_default_base(raw):
    assert read(**raw) == RopeConfig(base=777.0)


def test_both_spellings_mean_the_same():
    expected = RopeConfig(kind="linear", base=5000.0, factor=2.0)
    old = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2}}
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000, "factor": 2.0}}
    assert read(**old) == read(**new) == read(**old, **new) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rope_type": "default"}, RopeConfig(base=777.0)),
        ({"rope_theta": 9.0}, RopeConfig(base=9.0)),
        ({"rope_type": "linear", "factor": 3}, RopeConfig(kind="linear", base=777.0, factor=3.0)),
        (
            {"rope_type": "dynamic", "factor": 3.0},
            RopeConfig(kind="dynamic", base=777.0, factor=3.0, original_max_positions=128),
        ),
        (
            LLAMA3 | {"original_max_position_embeddings": 64},
            RopeConfig(
                kind="llama3",
                base=777.0,
                factor=8.0,
                original_max_positions=64,
                low_frequency_factor=1.0,
                high_frequency_factor=4.0,
            ),
        ),
        (
            YARN | {"truncate": False, "beta_fast": 7, "beta_slow": None},
            RopeConfig(
                kind="yarn",
                base=777.0,
                factor=4.0,
                original_max_positions=128,
                attention_factor=0.1 * math.log(4.0) + 1,
                beta_fast=7.0,
                truncate=False,
            ),
        ),
        (
            LONGROPE | {"attention_factor": 1.5},
            RopeConfig(
                kind="longrope",
                base=777.0,
                factor=4.0,
                original_max_positions=32,
                attention_factor=1.5,
                short_factor=(1.0, 1.5, 2.0, 2.5),
                long_factor=(2.0, 3.0, 4.0, 5.0),
            ),
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, RopeConfig) else "",
)
def test_every_kind_is_read(settings, expected):
    assert read(rope_parameters=settings) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (YARN, 0.1 * math.log(4) + 1),
        (YARN | {"factor": 1.0}, 1.0),
        (YARN | {"factor": None, "original_max_position_embeddings": 16}, 0.1 * math.log(8) + 1),
        (YARN | {"mscale": 2.0}, 0.1 * math.log(4) + 1),
        (
            YARN | {"mscale": 2.0, "mscale_all_dim": 0.5},
            (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
        ),
        (YARN | {"attention_factor": 0.7, "mscale": 2.0, "mscale_all_dim": 1.0}, 0.7),
        (LONGROPE, math.sqrt(1 + math.log(4) / math.log(32))),
        (LONGROPE | {"factor": 2.0}, math.sqrt(1 + math.log(2) / math.log(32))),
        (LONGROPE | {"original_max_position_embeddings": 256}, 1.0),
    ],
)
def test_attention_factors_are_resolved(settings, expected):
    assert read(rope_parameters=settings).attention_factor == pytest.approx(expected, rel=1e-12)


def test_the_trained_context_may_lie_beside_the_object():
    beside = {"original_max_position_embeddings": 32}
    inside = {name: v for name, v in LONGROPE.items() if name not in beside}
    assert read(rope_scaling=inside, **beside) == read(rope_scaling=LONGROPE)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object; got 'yarn'"),
        ({"rope_scaling": {"type": "su"}}, r"rope_scaling\.type must be one of default, dynamic"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear"}}, "'yarn'.*must agree"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "number of at least 1; got 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor must be .* got True"),
        ({"rope_scaling": {"factor": 2.0}}, r"rope_scaling\.factor = 2.0 is not a field"),
        ({"rope_parameters": {"full_attention": {}}}, "full_attention = {} is not a field"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"factor is missing.*null for the ratio"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "part of each head"),
        ({"rope_parameters": YARN | {"truncate": None}}, "truncate must be true or false"),
        ({"rope_parameters": YARN | {"beta_fast": 0}}, "beta_fast must be .* above 0"),
        (
            {"rope_parameters": YARN | {"attention_factor": 0}},
            "attention_factor must be .* above 0",
        ),
        ({"rope_parameters": YARN | {"mrope_section": [1]}}, "mrope_section = .* is not a field"),
        ({"rope_parameters": LONGROPE | {"short_factor": [1.0]}}, "list of 4 numbers .*1 values"),
        ({"rope_parameters": LONGROPE | {"long_factor": [1, 2, 3, 0]}}, r"long_factor\[3\] must"),
        ({"rope_parameters": LONGROPE | {"long_factor": 3.0}}, "long_factor must be a list of 4"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1}}, r"above low_freq_factor \(1\)"),
        ({"rope_parameters": {"rope_theta": 1}}, "rope_theta must be a finite number above 1"),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, "must be 6.0, as rope_theta"),
        (
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
            "original_max_position_embeddings must be 64, as .* says outside.*got 32",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "factor": 2.0,
                    "original_max_position_embeddings": 64,
                }
            },
            r"max_position_embeddings \(128\) or absent for dynamic rope; got 64",
        ),
        (
            {"rope_parameters": YARN, "rope_scaling": {"type": "linear", "factor": 4.0}},
            "rope_scaling and rope_parameters must mean the same",
        ),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(raw, text):
    with pytest.raises(ValueError, match=f"(?s){text}"):
        read(**raw)


def test_dynamic_needs_two_frequencies():
    fields = FieldReader({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "config.json: ")
    with pytest.raises(ValueError, match="dynamic needs a head_dim of at least 4"):
        read_rope(fields, 2, MAX_POSITIONS)
