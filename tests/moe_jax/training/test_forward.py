import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.training.export import export
from moe_jax.training.forward import forward
from tests.tolerances import assert_close


def test_logits_equal_the_engines(weights, config, tokenizer, tmp_path):
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    export(weights, config, tokenizer, tmp_path)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (2, 40)).astype(np.int32)
    engine = moe_jax.load(tmp_path, dtype="float32", max_tokens=64, max_seqs=1, progress=False)
    outputs = forward(weights, config, jnp.asarray(tokens))
    assert_close(outputs.logits, engine.logits(tokens), "float32")
    np.testing.assert_allclose(outputs.probabilities.sum(axis=-1), 1, rtol=1e-6)


def test_bfloat16_differs_by_rounding_only(weights, config):
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    narrow = forward(weights, config, tokens, dtype=jnp.bfloat16).logits
    wide = forward(weights, config, tokens).logits
    assert narrow.dtype == jnp.float32
    # A token near the border between two experts may change sides; the median may not.
    difference = jnp.abs(narrow - wide).max(axis=-1) / jnp.abs(wide).max()
    assert jnp.median(difference) < 2e-2


@pytest.mark.parametrize(
    "change",
    [
        {"family": "mixtral"},
        {"windows": (16, None)},
        {"moe_layers": (True, False)},
        {"activation": "gelu"},
    ],
    ids=str,
)
def test_other_kinds_of_model_are_refused(weights, config, change):
    other = dataclasses.replace(config, **change)
    with pytest.raises(ValueError, match="only a qwen3_moe model with experts in every layer"):
        forward(weights, other, jnp.zeros((1, 4), jnp.int32))
