"""Rotary position embedding: the angle of every position, and the rotation by it.

Knows neither heads' projections nor the cache; a token's position and length are given.

The kinds and their formulas are those of Hugging Face Transformers (`modeling_rope_utils`): linear
interpolation (kaiokendev), dynamic NTK (bloc97, emozilla), YaRN (arXiv:2309.00071), LongRoPE
(arXiv:2402.13753) and the ramp of Llama 3.1. Operations follow Transformers' order and precision:
a float32 angle at position 100 000 has lost four digits, and parity needs the same four lost.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.config import RopeConfig


def rope_angles(
    rope: RopeConfig,
    head_dim: int,
    positions: Int[Array, " tokens"],
    lengths: Int[Array, " tokens"],
) -> tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]:
    """Cosine and sine of every token's angles, times the attention factor.

    Args:
      rope: a validated rope config (`moe_jax.families` makes one).
      head_dim: width of a head, even; half of it is the number of frequencies.
      positions: each token's place in its sequence, from 0.
      lengths: per token, the length in tokens of the sequence its frequencies are chosen for. Only
        `dynamic` and `longrope` look at it: Transformers takes the largest position of the forward
        call plus one. Keys that are cached keep the frequencies they were rotated with.

    Returns:
      cos and sin, float32 [tokens, head_dim / 2].
    """
    if rope.kind == "dynamic":
        inverse = _dynamic_frequencies(rope, head_dim, lengths)
    elif rope.kind == "longrope":
        assert rope.original_max_positions is not None, "longrope has no original_max_positions"
        short = jnp.asarray(_longrope_frequencies(rope, head_dim, rope.short_factor))
        long = jnp.asarray(_longrope_frequencies(rope, head_dim, rope.long_factor))
        is_long = (lengths > rope.original_max_positions)[:, None]
        inverse = jnp.where(is_long, long[None, :], short[None, :])
    else:
        inverse = jnp.asarray(static_frequencies(rope, head_dim))[None, :]
    angles = positions.astype(jnp.float32)[:, None] * inverse
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "tokens heads head_dim"],
    cos: Float[Array, "tokens half"],
    sin: Float[Array, "tokens half"],
) -> Float[Array, "tokens heads head_dim"]:
    """Turns each pair (i, i + head_dim / 2) of every head by its token's angle.

    This is the half-split pairing of Hugging Face checkpoints, not the interleaved one of the
    RoFormer paper. Computes in float32 and returns the dtype of x.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def static_frequencies(rope: RopeConfig, head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians per position of the kinds that do not depend on the sequence length, float32."""
    if rope.kind == "default":
        return _reciprocal(_wavelengths(rope.base, head_dim))
    if rope.kind == "linear":
        return _reciprocal(_wavelengths(rope.base, head_dim)) / np.float32(_factor(rope))
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, head_dim)
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, head_dim)
    raise ValueError(f"the frequencies of rope kind {rope.kind!r} depend on the sequence length")


def _factor(rope: RopeConfig) -> float:
    """The stretch of a kind that has one."""
    assert rope.factor is not None, f"rope kind {rope.kind!r} has no factor"
    return rope.factor


def _exponents(head_dim: int) -> Float[np.ndarray, " half"]:
    """0, 2, 4, ... over head_dim, in float32."""
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def _wavelengths(base: float, head_dim: int) -> Float[np.ndarray, " half"]:
    """The geometric series from 1 to almost base, positions per radian, float32.

    The power is taken in float64 and rounded: float32 powers differ in the last bit between
    libraries, and a position multiplies that bit.
    """
    return np.power(np.float64(base), _exponents(head_dim).astype(np.float64)).astype(np.float32)


def _reciprocal(x: Float[np.ndarray, " half"]) -> Float[np.ndarray, " half"]:
    return np.float32(1) / x


def _dynamic_frequencies(
    rope: RopeConfig, head_dim: int, lengths: Int[Array, " tokens"]
) -> Float[Array, "tokens half"]:
    """The base grows with the length beyond the trained one, so that the slowest wave spans it."""
    factor, trained = _factor(rope), rope.original_max_positions
    assert trained is not None, "dynamic rope has no original_max_positions"
    stretch = factor * lengths.astype(jnp.float32) / trained - (factor - 1)
    # Within the trained length the stretch is 1 exactly; in float32 it could come out as 1 - 6e-8.
    base = rope.base * jnp.maximum(stretch, 1.0) ** (head_dim / (head_dim - 2))
    grown = 1.0 / jnp.power(base[:, None], jnp.asarray(_exponents(head_dim))[None, :])
    unchanged = jnp.asarray(_reciprocal(_wavelengths(rope.base, head_dim)))
    return jnp.where((lengths > trained)[:, None], grown, unchanged[None, :])


def _longrope_frequencies(
    rope: RopeConfig, head_dim: int, divisors: tuple[float, ...] | None
) -> Float[np.ndarray, " half"]:
    assert divisors is not None, "longrope lacks short_factor or long_factor"
    return _reciprocal(np.asarray(divisors, np.float32) * _wavelengths(rope.base, head_dim))


def _yarn_frequencies(rope: RopeConfig, head_dim: int) -> Float[np.ndarray, " half"]:
    """Fast waves stay, slow ones are interpolated, a linear ramp lies between (YaRN, 3.2)."""
    trained = rope.original_max_positions
    assert trained is not None, "yarn has no original_max_positions"

    def frequency_index(rotations: float) -> float:
        """The (fractional) frequency that turns this often over the trained length."""
        wavelength = trained / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.base))

    low, high = frequency_index(rope.beta_fast), frequency_index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    half = np.arange(head_dim // 2, dtype=np.float32)
    ramp = np.clip((half - np.float32(low)) / np.float32(high - low), np.float32(0), np.float32(1))
    keep = np.float32(1) - ramp
    wavelengths = _wavelengths(rope.base, head_dim)
    interpolated = _reciprocal(np.float32(_factor(rope)) * wavelengths)
    return interpolated * (np.float32(1) - keep) + _reciprocal(wavelengths) * keep


def _llama3_frequencies(rope: RopeConfig, head_dim: int) -> Float[np.ndarray, " half"]:
    """Short waves stay, long waves are divided by the factor, those between are blended."""
    trained, low, high = (
        rope.original_max_positions,
        rope.low_frequency_factor,
        rope.high_frequency_factor,
    )
    assert trained is not None and low is not None and high is not None, "llama3 rope is incomplete"
    inverse = _reciprocal(_wavelengths(rope.base, head_dim))
    factor = np.float32(_factor(rope))
    wavelength = _reciprocal(inverse) * np.float32(2 * math.pi)
    is_long = wavelength > np.float32(trained / low)
    is_short = wavelength < np.float32(trained / high)
    smooth = (_reciprocal(wavelength) * np.float32(trained) - np.float32(low)) / np.float32(
        high - low
    )
    blended = (np.float32(1) - smooth) * inverse / factor + smooth * inverse
    return np.where(is_long, inverse / factor, np.where(is_short, inverse, blended))
