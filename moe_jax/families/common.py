"""What the families' config.json files have in common.

Knows no family by name: what differs between them comes in as arguments.
"""

from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.config import Activation, AttentionConfig, ModelConfig, MoEConfig
from moe_jax.families.fields import NOT_NEGATIVE, FieldReader
from moe_jax.families.irrelevant import IRRELEVANT, OFF
from moe_jax.families.rope import read_rope

# Transformers has four spellings of the tanh approximation; they are one function.
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}
MOST_LAYERS = 10_000


class Sizes(NamedTuple):
    """The sizes of the trunk, which families read first."""

    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int


def read_sizes(fields: FieldReader, default_kv_heads: int | None) -> Sizes:
    """Reads the trunk's sizes.

    Args:
      fields: the whole config.
      default_kv_heads: num_key_value_heads where absent; None: as many as num_attention_heads,
        and null means the same.
    """
    embed, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if default_kv_heads is None:
        kv_heads = fields.optional_size("num_key_value_heads") or heads
    else:
        kv_heads = fields.size("num_key_value_heads", default_kv_heads)
    head_dim = fields.optional_size("head_dim") or embed // heads
    layers = fields.size("num_hidden_layers", maximum=MOST_LAYERS)
    return Sizes(layers, embed, heads, kv_heads, head_dim)


def read_num_experts(fields: FieldReader, name: str, alias: str) -> int:
    """The number of routed experts, which has two names."""
    fields.agree((name, alias))
    return fields.size(alias if fields.has(alias) and not fields.has(name) else name)


def read_sparse_layers(fields: FieldReader, layers: int) -> tuple[bool, ...]:
    """Which layers have experts: every decoder_sparse_step-th, but none of mlp_only_layers."""
    step = fields.size("decoder_sparse_step", 1)
    dense = fields.optional_sizes("mlp_only_layers")
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def read_model(
    fields: FieldReader,
    *,
    family: str,
    attention: AttentionConfig,
    moe: MoEConfig,
    dense_ffn: int,
    moe_layers: tuple[bool, ...],
    windows: tuple[int | None, ...],
    default_max_positions: int,
    default_norm_epsilon: float,
    default_rope_base: float = 10_000.0,
    irrelevant: frozenset[str] = frozenset(),
) -> ModelConfig:
    """Reads what all families share, refuses what nobody read, and puts the config together.

    Raises:
      ValueError: a field is missing, has a wrong type or value, or is not known.
    """
    max_positions = fields.size("max_position_embeddings", default_max_positions, minimum=2)
    config = ModelConfig(
        family=family,
        vocab=fields.size("vocab_size"),
        embed=fields.size("hidden_size"),
        dense_ffn=dense_ffn,
        attention=attention,
        moe=moe,
        rope=read_rope(fields, attention.head_dim, max_positions, default_rope_base),
        moe_layers=moe_layers,
        windows=windows,
        max_positions=max_positions,
        norm_epsilon=fields.number("rms_norm_eps", default_norm_epsilon, bound=NOT_NEGATIVE),
        activation=fields.choice("hidden_act", "silu", ACTIVATIONS),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
    )
    fields.only("quantization_config", None, "load an unquantised checkpoint (bf16, f16 or f32)")
    for name, value in OFF.items():
        fields.only(name, value, "it belongs to other kinds of model")
    fields.finish(IRRELEVANT | irrelevant)
    return config
