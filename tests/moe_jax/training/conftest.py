"""One tiny model of the kind that is trained."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.model.weights import ModelWeights
from moe_jax.training.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def config():
    return ModelConfig(
        family="qwen3_moe",
        vocab=300,
        embed=16,
        dense_ffn=64,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, qk_norm="head"),
        moe=MoEConfig(num_experts=4, experts_per_token=2, ffn=12),
        rope=RopeConfig(),
        moe_layers=(True, True),
        windows=(None, None),
        max_positions=256,
        tied_embeddings=True,
    )


@pytest.fixture
def weights(config):
    """Random weights with norm scales that are not 1."""
    made = ModelWeights(config, jnp.dtype(jnp.float32), nnx.Rngs(3), with_experts=True)
    graph, state = nnx.split(made)
    keys = iter(jax.random.split(jax.random.key(5), len(jax.tree.leaves(state))))
    shift = lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape)
    return nnx.merge(graph, jax.tree.map(shift, state))


@pytest.fixture(scope="session")
def tokenizer(config):
    words = ("value", "index", "encoding", "position", "buffer", "handle")
    lines = (f"def read_{word}(self):\n    return self._{word} + 1\n\n" for word in words)
    return train_tokenizer(lines, config.vocab)
