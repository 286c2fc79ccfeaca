import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import RopeConfig
from moe_jax.model.rope import rope_angles, rotate, static_frequencies

HEAD_DIM = 8
LONGROPE = RopeConfig(
    kind="longrope",
    factor=4.0,
    original_max_positions=10,
    attention_factor=1.2,
    short_factor=(1.0, 1.1, 1.2, 1.3),
    long_factor=(2.0, 3.0, 4.0, 5.0),
)
DYNAMIC = RopeConfig(kind="dynamic", factor=4.0, original_max_positions=10)
YARN = RopeConfig(kind="yarn", factor=4.0, original_max_positions=10, attention_factor=1.1)


def angles(rope: RopeConfig, positions: list[int], lengths: list[int]):
    return rope_angles(rope, HEAD_DIM, jnp.asarray(positions), jnp.asarray(lengths))


def one(rope: RopeConfig, position: int, length: int) -> np.ndarray:
    return np.concatenate(angles(rope, [position], [length]), axis=-1)


def test_default_angles_are_a_geometric_series():
    cos, sin = angles(RopeConfig(base=100.0), [0, 3], [4, 4])
    expected = np.array([[0.0], [3.0]]) / 100.0 ** (np.arange(4) / 4)
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos, np.cos(expected), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(expected), atol=1e-6)


def test_linear_divides_positions():
    linear = RopeConfig(kind="linear", factor=4.0)
    np.testing.assert_allclose(one(linear, 8, 9), one(RopeConfig(), 2, 9), atol=1e-6)


@pytest.mark.parametrize("rope", [RopeConfig(), YARN])
def test_static_kinds_ignore_the_length(rope):
    np.testing.assert_array_equal(one(rope, 7, 8), one(rope, 7, 1000))


def test_dynamic_changes_only_beyond_the_trained_length():
    for length in (0, 8, 10):
        np.testing.assert_array_equal(one(DYNAMIC, 7, length), one(RopeConfig(), 7, length))
    # At length L the slowest wave is stretched by factor L / trained - (factor - 1).
    stretch = 4.0 * 20 / 10 - 3.0
    slowest = 10_000.0 ** (-3 / 4) / stretch
    np.testing.assert_allclose(one(DYNAMIC, 19, 20)[0, 7], np.sin(19 * slowest), rtol=1e-5)


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE])
def test_every_token_has_its_own_length(rope):
    positions, lengths = [0, 5, 9, 10, 29], [1, 10, 10, 11, 30]
    together = np.concatenate(angles(rope, positions, lengths), axis=-1)
    alone = [one(rope, p, n)[0] for p, n in zip(positions, lengths, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_longrope_switches_divisors_beyond_the_trained_length():
    wavelengths = 10_000.0 ** (np.arange(4) / 4)
    for length, divisors in ((10, LONGROPE.short_factor), (11, LONGROPE.long_factor)):
        sin = 1.2 * np.sin(5 / (np.array(divisors) * wavelengths))
        np.testing.assert_allclose(one(LONGROPE, 5, length)[0, 4:], sin, rtol=1e-5)


def test_attention_factor_scales_cosine_and_sine():
    cos, sin = angles(YARN, [0, 6], [7, 7])
    np.testing.assert_allclose(cos**2 + sin**2, np.full((2, 4), 1.1**2), rtol=1e-5)


def test_rotation_pairs_the_halves():
    x = jnp.zeros((1, 1, 4)).at[0, 0, 1].set(1.0)
    quarter = jnp.array([[0.0, np.pi / 2]])
    np.testing.assert_allclose(
        rotate(x, jnp.cos(quarter), jnp.sin(quarter))[0, 0], [0, 0, 0, 1], atol=1e-6
    )


def test_scores_depend_only_on_the_distance():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 3, HEAD_DIM))

    def score(query_position, key_position):
        lengths = [100]
        turned_query = rotate(query, *angles(RopeConfig(), [query_position], lengths))
        turned_key = rotate(key, *angles(RopeConfig(), [key_position], lengths))
        return (turned_query * turned_key).sum(-1)

    np.testing.assert_allclose(score(13, 9), score(54, 50), atol=1e-4)
    assert np.abs(score(13, 9) - score(13, 10)).max() > 1e-2


def test_rotation_keeps_the_dtype_and_computes_in_float32():
    x = jax.random.normal(jax.random.key(1), (2, 3, HEAD_DIM)).astype(jnp.bfloat16)
    cos, sin = angles(RopeConfig(), [3, 70], [71, 71])
    turned = rotate(x, cos, sin)
    assert turned.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("rope", [RopeConfig(), YARN, DYNAMIC, LONGROPE])
def test_positions_and_lengths_are_traced(rope):
    traces = []

    @jax.jit
    def traced(positions, lengths):
        traces.append(1)
        return rope_angles(rope, HEAD_DIM, positions, lengths)

    for start in (0, 9, 30):
        positions = jnp.arange(3) + start
        np.testing.assert_allclose(
            traced(positions, positions + 1)[1],
            rope_angles(rope, HEAD_DIM, positions, positions + 1)[1],
            atol=1e-5,
        )
    assert traces == [1]


def test_frequencies_of_a_length_dependent_kind_are_refused():
    with pytest.raises(ValueError, match="'dynamic' depend on the sequence length"):
        static_frequencies(DYNAMIC, HEAD_DIM)
