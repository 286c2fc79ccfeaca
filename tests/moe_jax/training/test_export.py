import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.training.export import export
from moe_jax.training.restore import restore


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
