import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.checkpoint.targets import expected_targets
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.families import FAMILIES, read_config, tensor_rules

# The config.json files their authors published, without the fields that change no logit.
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN15_MOE = {
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OLMOE_7B = {
    "model_type": "olmoe",
    "attention_bias": False,
    "clip_qkv": None,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
}
PUBLISHED = {raw["model_type"]: raw for raw in (MIXTRAL_8X7B, QWEN15_MOE, QWEN3_30B, OLMOE_7B)}
PARAMETERS = {
    "mixtral": 46_702_792_704,
    "qwen2_moe": 14_315_784_192,
    "qwen3_moe": 30_532_122_624,
    "olmoe": 6_919_161_856,
}


def read(family: str, **changes) -> ModelConfig:
    return read_config(PUBLISHED[family] | changes)


def without(family: str, name: str) -> dict:
    return {n: v for n, v in PUBLISHED[family].items() if n != name}


@pytest.mark.parametrize("family", FAMILIES)
def test_published_models_have_their_published_number_of_parameters(family):
    shapes = expected_targets(read(family))
    assert sum(map(math.prod, shapes.values())) == PARAMETERS[family]


def test_every_field_arrives():
    assert read("qwen2_moe", num_hidden_layers=3, qkv_bias=True) == ModelConfig(
        family="qwen2_moe",
        vocab=151936,
        embed=2048,
        dense_ffn=5632,
        attention=AttentionConfig(heads=16, kv_heads=16, head_dim=128, qkv_bias=True),
        moe=MoEConfig(
            num_experts=60, experts_per_token=4, ffn=1408, shared_ffn=5632, normalise_gates=False
        ),
        rope=RopeConfig(base=1e6),
        moe_layers=(True,) * 3,
        windows=(None,) * 3,
        max_positions=8192,
        norm_epsilon=1e-6,
    )


# What Transformers' config classes say when a field is absent.
@pytest.mark.parametrize(
    ("family", "absent", "path", "expected"),
    [
        ("mixtral", "num_key_value_heads", "attention.kv_heads", 8),
        ("mixtral", "max_position_embeddings", "max_positions", 131072),
        ("mixtral", "rms_norm_eps", "norm_epsilon", 1e-5),
        ("mixtral", "rope_theta", "rope.base", 1e6),
        ("qwen2_moe", "num_key_value_heads", "attention.kv_heads", 16),
        ("qwen2_moe", "qkv_bias", "attention.qkv_bias", True),
        ("qwen2_moe", "norm_topk_prob", "moe.normalise_gates", False),
        ("qwen2_moe", "intermediate_size", "dense_ffn", 5632),
        ("qwen2_moe", "rope_theta", "rope.base", 1e4),
        ("qwen2_moe", "rms_norm_eps", "norm_epsilon", 1e-6),
        ("qwen3_moe", "head_dim", "attention.head_dim", 64),
        ("qwen3_moe", "num_key_value_heads", "attention.kv_heads", 4),
        ("qwen3_moe", "norm_topk_prob", "moe.normalise_gates", False),
        ("qwen3_moe", "max_position_embeddings", "max_positions", 32768),
        ("qwen3_moe", "hidden_act", "activation", "silu"),
        ("olmoe", "num_key_value_heads", "attention.kv_heads", 16),
        ("olmoe", "rms_norm_eps", "norm_epsilon", 1e-5),
        ("olmoe", "norm_topk_prob", "moe.normalise_gates", False),
        ("olmoe", "max_position_embeddings", "max_positions", 4096),
        ("olmoe", "tie_word_embeddings", "tied_embeddings", False),
    ],
)
def test_absent_fields_take_the_defaults_of_transformers(family, absent, path, expected):
    value = read_config(without(family, absent))
    for name in path.split("."):
        value = getattr(value, name)
    assert value == expected


@pytest.mark.parametrize(
    ("written", "activation"),
    [
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
    ],
)
def test_activations_have_several_spellings(written, activation):
    assert read("mixtral", hidden_act=written).activation == activation


def test_gates_are_normalised_as_the_family_says():
    assert read("mixtral").moe.normalise_gates
    for family in ("qwen2_moe", "qwen3_moe", "olmoe"):
        for flag in (True, False):
            assert read(family, norm_topk_prob=flag).moe.normalise_gates is flag


def test_biases_and_norms_are_those_of_the_family():
    plain = read("mixtral").attention
    assert not plain.qkv_bias and not plain.output_bias and plain.qk_norm == "none"
    assert replace(read("qwen2_moe").attention, qkv_bias=False, heads=32, kv_heads=8) == plain
    for family, norm in (("qwen3_moe", "head"), ("olmoe", "full")):
        attention = read(family, attention_bias=True).attention
        assert attention.qkv_bias and attention.output_bias and attention.qk_norm == norm
    assert read("olmoe", clip_qkv=8).attention.clip_qkv == 8.0
    assert not read("qwen2_moe", qkv_bias=False).attention.qkv_bias


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_dense_layers_lie_among_layers_of_experts(family):
    def moe_layers(**changes):
        return read(family, num_hidden_layers=5, **changes).moe_layers

    assert moe_layers(mlp_only_layers=None) == (True,) * 5
    assert moe_layers(mlp_only_layers=[0, 3, 99]) == (False, True, True, False, True)
    assert moe_layers(decoder_sparse_step=2) == (False, True, False, True, False)
    both = moe_layers(decoder_sparse_step=2, mlp_only_layers=[1])
    assert both == (False, False, False, True, False)


def test_windows_lie_where_transformers_puts_them():
    def windows(family, **changes):
        return read(family, num_hidden_layers=4, sliding_window=64, **changes).windows

    assert windows("mixtral") == (64,) * 4
    assert windows("qwen2_moe") == windows("qwen3_moe") == (None,) * 4
    assert windows("qwen3_moe", use_sliding_window=True, max_window_layers=2) == (64,) * 4
    used = {"use_sliding_window": True}
    assert windows("qwen2_moe", **used) == (64, None, 64, None)
    assert windows("qwen2_moe", **used, max_window_layers=2) == (64, None, None, None)
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert windows("qwen2_moe", **used, layer_types=types) == (None, 64, 64, None)
    assert (
        read("qwen2_moe", sliding_window=0, layer_types=["full_attention"] * 24).windows[0] is None
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_number_of_experts_has_two_names(family):
    for name in ("num_experts", "num_local_experts"):
        bare = {n: v for n, v in PUBLISHED[family].items() if "experts" not in n}
        raw = bare | {"num_experts_per_tok": 2, name: 8}
        assert read_config(raw).moe.num_experts == 8
    with pytest.raises(ValueError, match=r"num_experts = 9.*spellings of one setting"):
        read_config(raw | {"num_local_experts": 8, "num_experts": 9})


IRRELEVANT = {
    "architectures": ["X"],
    "attention_dropout": 0.1,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "initializer_range": 0.5,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.3,
    "torch_dtype": "bfloat16",
    "transformers_version": "9.9",
    "use_cache": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "somebody_elses_field": None,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_irrelevant_fields_change_nothing(family):
    assert read(family, **IRRELEVANT) == read(family)


@pytest.mark.parametrize(
    ("family", "changes", "text"),
    [
        ("mixtral", {"num_hidden_layers": "32"}, "num_hidden_layers must be a whole number"),
        ("mixtral", {"num_hidden_layers": 10**9}, "from 1 to 10000; got 1000000000"),
        ("mixtral", {"hidden_size": -1}, "hidden_size must be a whole number from 1"),
        ("mixtral", {"hidden_size": True}, "got True"),
        ("mixtral", {"hidden_size": 4096.0}, "got 4096.0"),
        ("mixtral", {"hidden_size": None}, "hidden_size must be .*; got None"),
        ("mixtral", {"vocab_size": 0}, "vocab_size must be a whole number from 1"),
        ("mixtral", {"num_experts_per_tok": 9}, r"num_experts_per_tok must lie in 1\.\.8"),
        (
            "mixtral",
            {"num_key_value_heads": 5},
            r"\(32\) must be a multiple of num_key_value_heads",
        ),
        ("mixtral", {"head_dim": 7}, "head_dim must be even"),
        ("mixtral", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
        ("mixtral", {"rms_norm_eps": -1e-5}, "rms_norm_eps must be a finite number of at least 0"),
        ("mixtral", {"rms_norm_eps": "1e-5"}, "rms_norm_eps .* got '1e-5'"),
        ("mixtral", {"rope_theta": float("inf")}, "rope_theta must be a finite number above 1"),
        ("mixtral", {"rope_theta": 10**400}, "rope_theta must be a finite number above 1"),
        ("mixtral", {"sliding_window": 0}, "sliding_window must be a whole number from 1"),
        ("mixtral", {"hidden_act": "quick_gelu"}, "hidden_act must be one of gelu, .*'quick_gelu'"),
        ("mixtral", {"hidden_act": ["silu"]}, "hidden_act must be one of"),
        ("mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false; got 1"),
        ("mixtral", {"attention_bias": True}, "mixtral has no biases; got True"),
        ("mixtral", {"norm_topk_prob": False}, "mixtral always normalises; got False"),
        ("mixtral", {"norm_topk_prob": 1}, "mixtral always normalises; got 1"),
        ("mixtral", {"quantization_config": {"bits": 4}}, "load an unquantised checkpoint"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "only a part of each head is not supported"),
        ("mixtral", {"is_encoder_decoder": True}, "other kinds of model"),
        ("mixtral", {"logit_scale": 2.0}, r"logit_scale = 2.0 is not a field.*may change the math"),
        ("mixtral", {"layer_types": ["full_attention"]}, "layer_types = .* is not a field"),
        ("qwen2_moe", {"num_experts": 0}, "num_experts must be a whole number from 1"),
        ("qwen2_moe", {"num_local_experts": 60}, "num_local_experts = 60 is not a field"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be"),
        ("qwen2_moe", {"mlp_only_layers": [-1]}, r"mlp_only_layers must be a list.*got \[-1\]"),
        ("qwen2_moe", {"mlp_only_layers": [True]}, r"mlp_only_layers must be a list"),
        ("qwen2_moe", {"mlp_only_layers": "01"}, "mlp_only_layers must be a list"),
        ("qwen2_moe", {"norm_topk_prob": None}, "norm_topk_prob must be true or false; got None"),
        ("qwen2_moe", {"layer_types": ["full_attention"]}, "a list of 24 layers; got '1 entries'"),
        ("qwen2_moe", {"layer_types": ["chunked"] * 24}, "layer_types must be a list of"),
        (
            "qwen2_moe",
            {"layer_types": ["sliding_attention"] * 24},
            "full_attention everywhere while use_sliding_window is off",
        ),
        (
            "qwen2_moe",
            {"use_sliding_window": True, "sliding_window": None},
            "sliding_window must be a whole number from 1",
        ),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "is not a field this family knows"),
        ("olmoe", {"head_dim": 64}, r"head_dim must be hidden_size / num_attention_heads"),
        ("olmoe", {"clip_qkv": 0}, "clip_qkv must be a finite number above 0; got 0"),
        ("olmoe", {"sliding_window": 64}, "olmoe attends to everything before; got 64"),
    ],
)
def test_values_that_cannot_be_honoured_are_refused_by_name(family, changes, text):
    with pytest.raises(ValueError, match=f"(?s){text}") as caught:
        read(family, **changes)
    if "must lie in" not in text and "multiple of" not in text and "even" not in text:
        assert str(caught.value).startswith(f"config.json of {family}: ")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, name) for family in FAMILIES for name in ("hidden_size", "num_hidden_layers")),
        *((family, "num_attention_heads") for family in FAMILIES),
        *((family, "num_experts_per_tok") for family in FAMILIES),
        *((family, "vocab_size") for family in FAMILIES),
        ("mixtral", "intermediate_size"),
        ("mixtral", "num_local_experts"),
        ("olmoe", "num_experts"),
        ("qwen2_moe", "moe_intermediate_size"),
        ("qwen2_moe", "shared_expert_intermediate_size"),
        ("qwen3_moe", "num_experts"),
    ],
)
def test_missing_sizes_are_named(family, name):
    with pytest.raises(ValueError, match=f"config.json of {family}: {name} is missing; it must be"):
        read_config(without(family, name))


@pytest.mark.parametrize("model_type", ["llama", None, 3, ["mixtral"]])
def test_unknown_families_are_refused_with_the_known_ones(model_type):
    with pytest.raises(ValueError, match="one of mixtral, olmoe, qwen2_moe, qwen3_moe; got"):
        read_config({"model_type": model_type})
    with pytest.raises(ValueError, match="one of mixtral, olmoe, qwen2_moe, qwen3_moe; got 'x'"):
        tensor_rules("x")


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**320), 10**320),
    st.integers(-3, 200),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 9), st.none(), st.text(max_size=3)), max_size=4),
    st.dictionaries(
        st.sampled_from(["type", "rope_type", "factor", "rope_theta", "x"]),
        st.one_of(st.floats(), st.sampled_from(["yarn", "linear", "longrope", "su"])),
        max_size=3,
    ),
)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_junk_gives_a_config_or_a_value_error(family, data):
    names = [*PUBLISHED[family], "rope_parameters", "rope_scaling", "head_dim", "layer_types"]
    changes = data.draw(st.dictionaries(st.sampled_from(names), JUNK, max_size=2))
    raw = PUBLISHED[family] | {"num_hidden_layers": 2} | changes
    try:
        config = read_config(raw | {"model_type": family})
    except ValueError as error:
        assert str(error)
    else:
        assert config.family == family
