"""Rotary settings of a config.json, in both of its spellings, as a RopeConfig.

Knows no family and computes no angle: `moe_jax.model.rope` does.

The spellings are `rope_scaling` (Transformers 4; the base is `rope_theta` beside it) and
`rope_parameters` (Transformers 5; the base is inside). Where Transformers lets one of two
contradicting values win, the config is refused. A factor that Transformers infers is resolved here.
"""

import math

from moe_jax.config import RopeConfig, RopeKind
from moe_jax.families.fields import (
    ABOVE_ONE,
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    FieldReader,
)

KINDS: dict[str, RopeKind] = {
    "default": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "longrope": "longrope",
    "llama3": "llama3",
}
WHOLE_HEADS = "rotating only a part of each head is not supported"


def read_rope(
    fields: FieldReader, head_dim: int, max_positions: int, default_base: float = 10_000.0
) -> RopeConfig:
    """Reads rope_scaling, rope_parameters, rope_theta and their relatives.

    Args:
      fields: the whole config.
      head_dim: width of a head; longrope lists one divisor per pair of it.
      max_positions: max_position_embeddings, where dynamic starts to stretch and which stands in
        for a missing original_max_position_embeddings.
      default_base: the family's rope_theta when none is given.

    Raises:
      ValueError: a setting is missing, out of range, unknown, or given twice with two values.
    """
    fields.only("partial_rotary_factor", 1.0, WHOLE_HEADS)
    given = {name: fields.take(name) for name in ("rope_scaling", "rope_parameters")}
    sizes = (head_dim, max_positions, default_base)
    readings = {
        name: _read_one(fields, fields.inner(name, value), *sizes)
        for name, value in given.items()
        if value is not None and value != {}
    }
    if not readings:
        readings = {"": _read_one(fields, fields.inner("rope_parameters", {}), *sizes)}
    first, *others = readings.values()
    if any(other != first for other in others):
        raise ValueError(f"rope_scaling and rope_parameters must mean the same; got {given}")
    return first


def _read_one(
    fields: FieldReader, rope: FieldReader, head_dim: int, max_positions: int, default_base: float
) -> RopeConfig:
    """Reads one object; fields of the config beside it serve where it is silent."""
    rope.agree(("rope_type", "type"))
    spelling = "type" if rope.take("rope_type") is None else "rope_type"
    kind = rope.choice(spelling, "default", KINDS)
    rope.only("partial_rotary_factor", 1.0, WHOLE_HEADS)
    inside = rope.optional_number("rope_theta", bound=ABOVE_ONE)
    beside = fields.optional_number("rope_theta", bound=ABOVE_ONE)
    if inside is not None and beside is not None and inside != beside:
        rope.refuse("rope_theta", inside, f"{beside!r}, as rope_theta says outside, or absent")
    base = inside or beside or default_base
    original = _original_max_positions(fields, rope, kind, max_positions)
    if kind in ("linear", "dynamic"):
        if kind == "dynamic" and head_dim < 4:
            rope.refuse(spelling, kind, f"another kind: {kind} needs a head_dim of at least 4")
        factor = rope.number("factor", bound=AT_LEAST_ONE)
        trained = max_positions if kind == "dynamic" else None
        config = RopeConfig(kind=kind, base=base, factor=factor, original_max_positions=trained)
    elif kind == "yarn":
        config = _read_yarn(rope, base, original, max_positions)
    elif kind == "longrope":
        config = _read_longrope(rope, base, original, max_positions, head_dim // 2)
    elif kind == "llama3":
        config = _read_llama3(rope, base, original)
    else:
        config = RopeConfig(base=base)
    rope.finish()
    return config


def _original_max_positions(
    fields: FieldReader, rope: FieldReader, kind: RopeKind, max_positions: int
) -> int:
    """The trained context, inside the object (usual) or beside it (Phi-3 and its relatives)."""
    name = "original_max_position_embeddings"
    inside, beside = rope.optional_size(name, minimum=2), fields.optional_size(name, minimum=2)
    if inside is not None and beside is not None and inside != beside:
        rope.refuse(name, inside, f"{beside}, as {name} says outside, or absent")
    original = inside or beside or max_positions
    if kind in ("default", "linear", "dynamic") and original != max_positions:
        rope.refuse(
            name, original, f"max_position_embeddings ({max_positions}) or absent for {kind} rope"
        )
    return original


def _read_yarn(rope: FieldReader, base: float, original: int, max_positions: int) -> RopeConfig:
    if not rope.has("factor"):
        rope.missing("factor", "a number of at least 1, or null for the ratio of the contexts")
    factor = rope.optional_number("factor", bound=AT_LEAST_ONE)
    if factor is None:
        factor = max_positions / original
    attention_factor = rope.optional_number("attention_factor", bound=POSITIVE)
    mscale = rope.optional_number("mscale", bound=NOT_NEGATIVE)
    mscale_all_dim = rope.optional_number("mscale_all_dim", bound=NOT_NEGATIVE)
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_scale(factor, 1.0)
    return RopeConfig(
        kind="yarn",
        base=base,
        factor=factor,
        original_max_positions=original,
        attention_factor=attention_factor,
        beta_fast=rope.optional_number("beta_fast", bound=POSITIVE) or 32.0,
        beta_slow=rope.optional_number("beta_slow", bound=POSITIVE) or 1.0,
        truncate=rope.flag("truncate", True),
    )


def _yarn_scale(factor: float, mscale: float) -> float:
    """How much longer queries and keys become when the context grows by factor."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _read_longrope(
    rope: FieldReader, base: float, original: int, max_positions: int, half: int
) -> RopeConfig:
    factor = rope.optional_number("factor", bound=AT_LEAST_ONE)
    if factor is None:
        factor = max_positions / original
    attention_factor = rope.optional_number("attention_factor", bound=POSITIVE)
    if attention_factor is None:
        stretched = math.log(max(factor, 1.0)) / math.log(original)
        attention_factor = math.sqrt(1 + stretched)
    return RopeConfig(
        kind="longrope",
        base=base,
        factor=factor,
        original_max_positions=original,
        attention_factor=attention_factor,
        short_factor=rope.numbers("short_factor", count=half, bound=POSITIVE),
        long_factor=rope.numbers("long_factor", count=half, bound=POSITIVE),
    )


def _read_llama3(rope: FieldReader, base: float, original: int) -> RopeConfig:
    low = rope.number("low_freq_factor", bound=POSITIVE)
    high = rope.number("high_freq_factor", bound=POSITIVE)
    if high <= low:
        rope.refuse("high_freq_factor", high, f"above low_freq_factor ({low:g})")
    return RopeConfig(
        kind="llama3",
        base=base,
        factor=rope.number("factor", bound=AT_LEAST_ONE),
        original_max_positions=original,
        low_frequency_factor=low,
        high_frequency_factor=high,
    )
