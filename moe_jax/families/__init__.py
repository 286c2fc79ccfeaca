"""Model families: what their Hugging Face config.json means and what their tensors are called.

Knows no arrays and opens no file. A new family is one module with `config_from_huggingface` and
`TENSOR_RULES`, and one line in the table below.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moe_jax.config import ModelConfig
from moe_jax.families import mixtral, olmoe, qwen2_moe, qwen3_moe
from moe_jax.families.rules import TIED_RULE, UNTIED_RULE
from moe_jax.families.rules import Rule as Rule
from moe_jax.families.rules import resolve as resolve


class Family(NamedTuple):
    """One model family.

    Attributes:
      read_config: turns a parsed config.json into a ModelConfig.
      rules: its tensor names, all but the unembedding's, which depends on whether it is tied.
    """

    read_config: Callable[[Mapping[str, object]], ModelConfig]
    rules: tuple[Rule, ...]


FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(mixtral.config_from_huggingface, mixtral.TENSOR_RULES),
    "olmoe": Family(olmoe.config_from_huggingface, olmoe.TENSOR_RULES),
    "qwen2_moe": Family(qwen2_moe.config_from_huggingface, qwen2_moe.TENSOR_RULES),
    "qwen3_moe": Family(qwen3_moe.config_from_huggingface, qwen3_moe.TENSOR_RULES),
}


def read_config(raw: Mapping[str, object]) -> ModelConfig:
    """Turns a parsed config.json into a ModelConfig.

    Raises:
      ValueError: the family is unknown, or a field is missing, has a wrong type or value, or is
        not known and so may change the mathematics. The text names the field.
    """
    return _family(raw.get("model_type")).read_config(raw)


def tensor_rules(family: str, tied_embeddings: bool = False) -> tuple[Rule, ...]:
    """The rules for every tensor that a checkpoint of this family may have.

    Args:
      family: `ModelConfig.family`.
      tied_embeddings: `ModelConfig.tied_embeddings`; if so, lm_head.weight is ignored on purpose.

    Raises:
      ValueError: the family is unknown.
    """
    return (*_family(family).rules, TIED_RULE if tied_embeddings else UNTIED_RULE)


def _family(name: object) -> Family:
    if not isinstance(name, str) or name not in FAMILIES:
        have = ", ".join(FAMILIES)
        raise ValueError(f"config.json: model_type must be one of {have}; got {name!r}")
    return FAMILIES[name]
