import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.training.export import export
from moe_jax.training.restore import restore, restore_mean


def test_what_is_restored_was_exported(weights, config, tokenizer, tmp_path):
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    export(weights, config, tokenizer, tmp_path, shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    restored, found = restore(tmp_path, jnp.bfloat16)
    assert found == config
    expected = jax.tree.leaves_with_path(weights)
    for (path, before), after in zip(expected, jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(before, after, err_msg=jax.tree_util.keystr(path))


def test_exporting_again_replaces_every_file(weights, config, tokenizer, tmp_path):
    export(weights, config, tokenizer, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    halved = jax.tree.map(lambda leaf: leaf / 2, weights)
    export(halved, config, tokenizer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    restored, _ = restore(tmp_path)
    expected = halved.embedding[...].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(restored.embedding[...], expected)


def test_the_mean_of_trainings_is_that_of_their_weights(weights, config, tokenizer, tmp_path):
    export(weights, config, tokenizer, tmp_path / "one")
    fourfold = jax.tree.map(lambda leaf: leaf * 4, weights)
    export(fourfold, config, tokenizer, tmp_path / "four")
    mean, found = restore_mean([tmp_path / name for name in ("one", "one", "four")])
    assert found == config
    once, _ = restore(tmp_path / "one")
    for one, other in zip(*map(jax.tree.leaves, map(nnx.state, (mean, once))), strict=True):
        np.testing.assert_allclose(one, 2 * other, rtol=1e-6)


def test_different_models_have_no_mean(weights, config, tokenizer, tmp_path):
    export(weights, config, tokenizer, tmp_path / "one")
    other = dataclasses.replace(config, norm_epsilon=0.5)
    export(weights, other, tokenizer, tmp_path / "two")
    with pytest.raises(ValueError, match="hold models of different shapes"):
        restore_mean([tmp_path / "one", tmp_path / "two"])
