import jax.numpy as jnp
import pytest

from moe_jax.checkpoint.targets import expected_targets, part_rows, parts_of, target_bytes
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig


def config(**changes) -> ModelConfig:
    return ModelConfig(
        **{
            "family": "qwen2_moe",
            "vocab": 11,
            "embed": 8,
            "dense_ffn": 10,
            "attention": AttentionConfig(heads=4, kv_heads=2, head_dim=2, qkv_bias=True),
            "moe": MoEConfig(num_experts=3, experts_per_token=2, ffn=6, shared_ffn=5),
            "rope": RopeConfig(),
            "moe_layers": (True, False),
            "windows": (None, None),
            "max_positions": 64,
        }
        | changes
    )


def test_lists_dense_weights_then_experts():
    targets = expected_targets(config())
    assert targets["layers.0.attention.qkv"] == (16, 8)
    assert targets["layers.0.shared.ffn.gate_up"] == (10, 8)
    assert targets["layers.1.ffn.gate_up"] == (20, 8)
    assert targets["unembedding"] == (11, 8)
    assert "layers.1.router" not in targets
    experts = [f"layers.0.experts.{e}.{kind}" for e in range(3) for kind in ("gate_up", "down")]
    assert list(targets)[-6:] == experts
    assert [targets[name] for name in experts[:2]] == [(12, 8), (8, 6)]


def test_tied_embeddings_are_one_weight():
    assert "unembedding" not in expected_targets(config(tied_embeddings=True))


def test_bytes_at_true_size():
    """Qwen3-30B-A3B has 30.5 billion parameters."""
    true_size = config(
        vocab=151_936,
        embed=2048,
        dense_ffn=6144,
        attention=AttentionConfig(heads=32, kv_heads=4, head_dim=128, qk_norm="head"),
        moe=MoEConfig(num_experts=128, experts_per_token=8, ffn=768),
        moe_layers=(True,) * 48,
        windows=(None,) * 48,
    )
    assert target_bytes(true_size, jnp.dtype("bfloat16")) == 2 * 30_532_122_624


@pytest.mark.parametrize(
    ("target", "part", "rows"),
    [
        ("layers.0.attention.qkv", "query", (0, 8)),
        ("layers.0.attention.qkv", "key", (8, 12)),
        ("layers.0.attention.qkv_bias", "value", (12, 16)),
        ("layers.1.ffn.gate_up", "up", (10, 20)),
        ("layers.0.shared.ffn.gate_up", "gate", (0, 5)),
        ("layers.0.experts.2.gate_up", "up", (6, 12)),
        ("embedding", None, (None, None)),
    ],
)
def test_part_rows(target, part, rows):
    assert part_rows(config(), target, part) == slice(*rows)


@pytest.mark.parametrize("target", ["layers.0.attention.qkv", "layers.0.experts.1.gate_up"])
def test_parts_tile_their_target(target):
    rows = [part_rows(config(), target, part) for part in parts_of(target)]
    assert [r.start for r in rows] == [0, *(r.stop for r in rows[:-1])]
    assert rows[-1].stop == expected_targets(config())[target][0]
