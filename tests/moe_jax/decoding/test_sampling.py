import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.decoding.sampling import (
    SamplingOptions,
    filter_logits,
    sample,
    sample_greedy,
    stack_options,
)
from moe_jax.decoding.sampling_params import SamplingParams

VOCAB = 40

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_k=5, seed=2),
    SamplingParams(temperature=1.3, top_p=0.8, seed=3),
    SamplingParams(temperature=0.9, min_p=0.1, repetition_penalty=1.5, seed=4),
    SamplingParams(temperature=2.0, top_k=20, top_p=0.9, min_p=0.02, seed=2**32 - 1),
]


def logits_and_seen(rows: int, vocab: int = VOCAB, seed: int = 0):
    logits, seen = jax.random.split(jax.random.key(seed))
    return (
        3 * jax.random.normal(logits, (rows, vocab)),
        jax.random.bernoulli(seen, 0.3, (rows, vocab)),
    )


def take(options: SamplingOptions, rows: list[int]) -> SamplingOptions:
    return jax.tree.map(lambda x: x[jnp.array(rows)], options)


def filter_plainly(logits, params: SamplingParams, seen) -> np.ndarray:
    """The definition, for one sequence, with a sort."""
    x = np.asarray(logits, np.float64)
    x = np.where(
        seen, np.where(x < 0, x * params.repetition_penalty, x / params.repetition_penalty), x
    )
    x = x / (params.temperature or 1.0)
    if params.top_k is not None:
        x = np.where(x >= np.sort(x)[-min(params.top_k, x.size)], x, -np.inf)
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    x[order[before >= params.top_p]] = -np.inf
    x[p < params.min_p * p.max()] = -np.inf
    return x - x.max()


@hypothesis.settings(derandomize=True, deadline=None, max_examples=60)
@hypothesis.given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, VOCAB + 5),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.5, 2),
)
def test_filter_follows_the_definition(seed, **options):
    params = SamplingParams(**options)
    logits, seen = logits_and_seen(1, seed=seed)
    expected = filter_plainly(logits[0], params, seen[0])
    actual = jax.jit(filter_logits)(logits, stack_options([params], VOCAB), seen)[0]
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(temperature=1), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(temperature=1, top_k=1), [1]),
        (SamplingParams(temperature=1, top_k=2), [1, 2, 4]),  # 2 and 4 are equally likely
        (SamplingParams(temperature=1, top_k=100), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(temperature=1, top_p=1e-30), [1]),
        (SamplingParams(temperature=1, min_p=1), [1]),
        (SamplingParams(temperature=1, min_p=np.exp(-2.01)), [1, 2, 4]),
        (SamplingParams(temperature=1e-45), [0, 1, 2, 3, 4, 5]),  # counts as greedy
    ],
)
def test_filter_keeps(params, kept):
    logits = jnp.array([[0.0, 3.0, 1.0, -0.0, 1.0, -60.0]])
    filtered = filter_logits(logits, stack_options([params], 6), jnp.zeros((1, 6), bool))
    assert np.flatnonzero(np.isfinite(filtered[0])).tolist() == kept
    assert filtered.max() == 0


def test_tokens_masked_by_the_model_are_never_drawn():
    logits = jnp.full((1, VOCAB), -jnp.inf).at[0, jnp.array([7, 9])].set(0.5)
    options = stack_options([SamplingParams(temperature=1.0, top_p=0.9)], VOCAB)
    seen = jnp.ones((1, VOCAB), bool)
    drawn = {int(sample(logits, options, jnp.array([i]), seen)[0][0]) for i in range(20)}
    assert drawn == {7, 9}


def test_a_request_draws_the_same_tokens_in_any_batch():
    rows = len(PARAMS)
    options = stack_options(PARAMS, VOCAB)
    logits, seen = logits_and_seen(rows)
    position = jnp.arange(rows, dtype=jnp.int32) * 3
    tokens, log_probability = sample(logits, options, position, seen)
    for chosen in ([3], [5, 4, 3, 2, 1, 0], [2, 5, 0]):
        index = jnp.array(chosen)
        again, log_again = sample(
            logits[index], take(options, chosen), position[index], seen[index]
        )
        np.testing.assert_array_equal(again, tokens[index])
        np.testing.assert_allclose(log_again, log_probability[index], rtol=1e-6)


def test_a_tiny_temperature_takes_the_likeliest():
    options = stack_options([SamplingParams(temperature=1e-30)], VOCAB)
    logits, seen = 1e4 * logits_and_seen(1)[0], jnp.zeros((1, VOCAB), bool)
    token, _ = sample(logits, options, jnp.array([0]), seen)
    assert token[0] == jnp.argmax(logits)


def test_seed_and_position_change_the_draw():
    logits = jnp.zeros((1, 10_000))
    seen = jnp.zeros((1, 10_000), bool)

    def draw(seed: int, position: int) -> int:
        options = stack_options([SamplingParams(temperature=1.0, seed=seed)], 10_000)
        return int(sample(logits, options, jnp.array([position]), seen)[0][0])

    assert len({draw(seed, position) for seed in range(4) for position in range(4)}) == 16
    assert draw(3, 2) == draw(3, 2)


def test_greedy_rows_and_greedy_function():
    logits, seen = logits_and_seen(4)
    expected, expected_log = sample_greedy(logits)
    np.testing.assert_array_equal(expected, jnp.argmax(logits, axis=-1))
    assert expected.dtype == jnp.int32
    mixed = [SamplingParams(), SamplingParams(temperature=1.0, seed=9)] * 2
    tokens, log_probability = sample(
        logits, stack_options(mixed, VOCAB), jnp.zeros(4, jnp.int32), seen
    )
    np.testing.assert_array_equal(tokens[::2], expected[::2])
    np.testing.assert_array_equal(log_probability[::2], expected_log[::2])


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = jnp.array([[0.0, 2.0, 2.0], [-0.0, 0.0, -1.0]])
    options = stack_options([SamplingParams()] * 2, 3)
    seen = jnp.zeros((2, 3), bool)
    for tokens, _ in (sample_greedy(logits), sample(logits, options, jnp.array([0, 0]), seen)):
        np.testing.assert_array_equal(tokens, [1, 0])


def test_greedy_follows_the_repetition_penalty():
    logits = jnp.array([[3.0, 2.9, -1.0], [-1.0, -1.1, -9.0]])
    options = stack_options([SamplingParams(repetition_penalty=1.2)] * 2, 3)
    seen = jnp.array([[True, False, False]] * 2)
    tokens, _ = sample(logits, options, jnp.array([0, 0]), seen)
    np.testing.assert_array_equal(tokens, [1, 1])


def test_log_probabilities_are_those_of_the_model():
    logits, seen = logits_and_seen(len(PARAMS))
    tokens, log_probability = sample(
        logits, stack_options(PARAMS, VOCAB), jnp.zeros(len(PARAMS), jnp.int32), seen
    )
    expected = jax.nn.log_softmax(logits)[jnp.arange(len(PARAMS)), tokens]
    np.testing.assert_allclose(log_probability, expected, rtol=1e-5, atol=1e-6)
    assert log_probability.dtype == jnp.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_unusable_logits_show_in_the_log_probability_of_their_row_only(bad):
    options = stack_options([PARAMS[0], PARAMS[5], PARAMS[5]], VOCAB)
    logits, seen = logits_and_seen(3)
    logits = logits.at[:2, 11].set(bad)
    position = jnp.zeros(3, jnp.int32)
    for tokens, log_probability in (
        sample(logits, options, position, seen),
        sample_greedy(logits),
    ):
        np.testing.assert_array_equal(np.isnan(log_probability), [True, True, False])
        assert ((tokens >= 0) & (tokens < VOCAB)).all()


def test_draws_follow_the_filtered_distribution():
    draws, vocab = 20_000, 12
    params = SamplingParams(temperature=0.8, top_k=9, top_p=0.97, repetition_penalty=1.3, seed=5)
    logits, seen = logits_and_seen(1, vocab, seed=3)
    logits = logits / 3
    options = stack_options([params], vocab)
    expected = np.asarray(jax.nn.softmax(filter_logits(logits, options, seen)[0]))
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (draws,)), options)
    tokens, _ = sample(
        jnp.broadcast_to(logits, (draws, vocab)),
        rows,
        jnp.arange(draws, dtype=jnp.int32),
        jnp.broadcast_to(seen, (draws, vocab)),
    )
    counts = np.bincount(np.asarray(tokens), minlength=vocab)
    possible = expected > 0
    assert 3 < possible.sum() < vocab
    assert counts[~possible].sum() == 0
    chi_square = ((counts - draws * expected) ** 2)[possible] / (draws * expected[possible])
    degrees = possible.sum() - 1
    # Four standard deviations above the mean of the chi-square distribution.
    assert chi_square.sum() < degrees + 4 * np.sqrt(2 * degrees)


def test_compiles_once_for_all_options():
    traces = []

    @jax.jit
    def counted(*arguments):
        traces.append(1)
        return sample(*arguments)

    logits, seen = logits_and_seen(1)
    for step, params in enumerate(PARAMS):
        counted(logits, stack_options([params], VOCAB), jnp.array([step]), seen)
    assert len(traces) == 1
