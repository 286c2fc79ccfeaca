import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.families import read_config
from moe_jax.model.rope import rope_angles, rotate, static_frequencies

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.golden

HEAD_DIM = 32
TRAINED = 64
MAX_POSITIONS = 256
SHORT = [1 + 0.01 * i for i in range(HEAD_DIM // 2)]
LONG = [1 + 0.7 * i for i in range(HEAD_DIM // 2)]
TRAINED_HERE = {"original_max_position_embeddings": TRAINED}
YARN = {"rope_type": "yarn", "factor": 4.0} | TRAINED_HERE
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG} | TRAINED_HERE
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STATIC = {
    "default": {"rope_type": "default"},
    "base": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 3.3},
    "yarn": YARN,
    "yarn_mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn_mscale_alone": YARN | {"mscale": 0.5},
    "yarn_attention_factor": YARN | {"attention_factor": 1.4},
    "yarn_not_truncated": YARN | {"truncate": False, "beta_fast": 7, "beta_slow": 0.3},
    "yarn_inferred": {"rope_type": "yarn", "factor": None} | TRAINED_HERE,
    "yarn_without_original": {"rope_type": "yarn", "factor": 2.0},
    "yarn_one_step": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "llama3": LLAMA3 | TRAINED_HERE,
    "llama3_without_original": LLAMA3,
}
BY_LENGTH = {
    "dynamic": {"rope_type": "dynamic", "factor": 3.3},
    "longrope": LONGROPE,
    "longrope_factor": LONGROPE | {"factor": 2.0},
    "longrope_attention_factor": LONGROPE | {"attention_factor": 0.9, "factor": 8.0},
}


def both_sides(settings):
    """Transformers' rotary module and our RopeConfig, from the same settings."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": HEAD_DIM,
        "vocab_size": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": TRAINED if settings["rope_type"] == "dynamic" else MAX_POSITIONS,
    }
    settings = {"rope_theta": 2e4} | settings
    ours = read_config({"model_type": "mixtral", "rope_parameters": settings, **sizes}).rope
    config = transformers.MixtralConfig(rope_parameters=dict(settings), **sizes)
    module = transformers.models.mixtral.modeling_mixtral.MixtralRotaryEmbedding(config)
    return module, ours


@pytest.mark.parametrize("name", STATIC)
def test_frequencies_equal_transformers(name):
    module, ours = both_sides(STATIC[name])
    assert ours.attention_factor == pytest.approx(module.attention_scaling, rel=1e-12)
    frequencies = static_frequencies(ours, HEAD_DIM)
    assert frequencies.dtype == np.float32
    # One unit in the last place: torch's float32 power is not correctly rounded.
    np.testing.assert_allclose(frequencies, module.inv_freq.numpy(), rtol=1.3e-7)


@pytest.mark.parametrize(
    ("name", "length"),
    [
        *((name, 1000) for name in STATIC),
        *((name, TRAINED + beyond) for name in BY_LENGTH for beyond in (-1, 0, 1, 1000)),
    ],
)
def test_angles_equal_transformers(name, length):
    module, ours = both_sides((STATIC | BY_LENGTH)[name])
    expected = module(torch.zeros(1), torch.arange(length)[None])
    angles = jax.jit(lambda p, n: rope_angles(ours, HEAD_DIM, p, n))
    actual = angles(jnp.arange(length), jnp.full(length, length))
    # A frequency that is off by its last bit moves the largest angle by one float32 step.
    tolerance = 1e-6 + np.spacing(np.float32(length))
    for mine, theirs in zip(actual, expected, strict=True):
        half = theirs[0, :, : HEAD_DIM // 2].numpy()
        np.testing.assert_allclose(mine, half, rtol=0, atol=tolerance)


def test_rotation_equals_transformers():
    module, ours = both_sides(STATIC["yarn"])
    x = torch.randn(1, 3, 20, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    cos, sin = module(x, torch.arange(20)[None])
    apply = transformers.models.mixtral.modeling_mixtral.apply_rotary_pos_emb
    expected = apply(x, x, cos, sin)[0][0].transpose(0, 1)
    angles = rope_angles(ours, HEAD_DIM, jnp.arange(20), jnp.full(20, 20))
    actual = rotate(jnp.asarray(x[0].transpose(0, 1).numpy()), *angles)
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5)
