import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.decoding.filters import filter_logits
from moe_jax.decoding.sampling import Sampled, sample, sample_greedy
from moe_jax.decoding.sampling_options import SamplingOptions, stack_options
from moe_jax.decoding.sampling_params import SamplingParams
from moe_jax.decoding.text_counts import TextCounts

VOCAB = 40

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_k=5, seed=2),
    SamplingParams(temperature=1.3, top_p=0.8, seed=3, logit_bias={3: 9.0, 4: -2.0}),
    SamplingParams(temperature=0.9, min_p=0.1, repetition_penalty=1.5, seed=4),
    SamplingParams(temperature=2.0, top_k=20, top_p=0.9, min_p=0.02, seed=2**32 - 1),
    SamplingParams(frequency_penalty=1.0, presence_penalty=0.5, min_tokens=60),
]


def options_of(params: list[SamplingParams], vocab: int = VOCAB) -> SamplingOptions:
    return stack_options(params, [{0, 1, 2}] * len(params), vocab)


def logits_of(rows: int, vocab: int = VOCAB, seed: int = 0):
    return 3 * jax.random.normal(jax.random.key(seed), (rows, vocab))


def counts_of(rows: int, vocab: int = VOCAB) -> TextCounts:
    prompt, generated = jax.random.split(jax.random.key(77))
    return TextCounts(
        jax.random.bernoulli(prompt, 0.3, (rows, vocab)),
        jax.random.randint(generated, (rows, vocab), 0, 3),
    )


def draw(logits, options: SamplingOptions, position=None, top: int = 0) -> Sampled:
    """`sample` for rows without counts."""
    zeros = jnp.zeros(logits.shape[0], jnp.int32)
    position = zeros if position is None else position
    return sample(logits, options, position, None, zeros, zeros, top=top)[0]


def test_tokens_masked_by_the_model_are_never_drawn():
    logits = jnp.full((1, VOCAB), -jnp.inf).at[0, jnp.array([7, 9])].set(0.5)
    for params in (SamplingParams(temperature=1.0, top_p=0.9), SamplingParams(temperature=1.0)):
        options = options_of([params])
        drawn = {int(draw(logits, options, jnp.array([i])).token[0]) for i in range(20)}
        assert drawn == {7, 9}


def test_forbidden_tokens_are_never_drawn():
    """By the mask of the step, and before min_tokens by the list of stop tokens."""
    params = SamplingParams(temperature=5.0, min_tokens=3, logit_bias={1: 100.0, 30: 100.0})
    steps = 500
    options = options_of([params] * steps)
    allowed = jnp.zeros((steps, VOCAB), bool).at[:, jnp.array([1, 2, 5, 9])].set(True)
    logits, places = jnp.zeros((steps, VOCAB)), jnp.arange(steps, dtype=jnp.int32)
    for new, expected in ((2, {5, 9}), (3, {1})):
        new_tokens = jnp.full(steps, new)
        sampled, _ = sample(logits, options, places, None, places, new_tokens, allowed)
        assert set(np.asarray(sampled.token).tolist()) == expected
        np.testing.assert_allclose(sampled.logprob, -np.log(VOCAB), rtol=1e-6)


def test_a_request_draws_the_same_tokens_in_any_batch():
    """Alone it may run another program: without the features of its batch mates."""
    rows = len(PARAMS)
    logits = logits_of(rows)
    position = jnp.arange(rows, dtype=jnp.int32) * 3
    new = jnp.arange(rows, dtype=jnp.int32)
    allowed = jax.random.bernoulli(jax.random.key(5), 0.8, (rows, VOCAB)).at[0].set(True)
    place = jnp.array([0, 2, 9, 3, 1, 10, 5])  # rows of the counts; past the last: none
    expected, counted = sample(
        logits, options_of(PARAMS), position, counts_of(9), place, new, allowed, top=20
    )
    for chosen in ([0], [1], [6, 5, 4, 3, 2, 1, 0], [2, 3, 0, 0], [6, 1]):
        index = jnp.array(chosen)
        again, counted_again = sample(
            logits[index],
            options_of([PARAMS[i] for i in chosen]),
            position[index],
            counts_of(9),
            place[index],
            new[index],
            None if chosen == [0] else allowed[index],
            top=20,
        )
        np.testing.assert_array_equal(again.token, expected.token[index])
        np.testing.assert_array_equal(again.top_tokens, expected.top_tokens[index])
        np.testing.assert_allclose(again.logprob, expected.logprob[index], rtol=1e-6)
        if chosen == [6, 1]:
            np.testing.assert_array_equal(
                counted_again.generated[place[index]], counted.generated[place[index]]
            )


def test_chosen_tokens_are_counted():
    """For the rows that are given, not for padding; the counts are donated."""
    params = [SamplingParams(presence_penalty=0.1)] * 3
    counts = counts_of(4)
    before, prompt = np.array(counts.generated), np.array(counts.in_prompt)
    zeros = jnp.zeros(3, jnp.int32)
    place = jnp.array([3, 4, 1])
    sampled, after = sample(logits_of(3), options_of(params), zeros, counts, place, zeros)
    before[3, sampled.token[0]] += 1
    before[1, sampled.token[2]] += 1
    np.testing.assert_array_equal(after.generated, before)
    np.testing.assert_array_equal(after.in_prompt, prompt)
    assert counts.generated.is_deleted()


def test_a_penalty_falls_on_what_was_just_chosen():
    logits = jnp.array([[0.0, 1.0, 0.9, 0.8]])
    options = options_of([SamplingParams(presence_penalty=0.15)], 4)
    counts = TextCounts(jnp.zeros((1, 4), bool), jnp.zeros((1, 4), jnp.int32))
    tokens, zero = [], jnp.array([0])
    for _ in range(4):
        sampled, counts = sample(logits, options, zero, counts, zero, zero)
        tokens.append(int(sampled.token[0]))
    assert tokens == [1, 2, 1, 1]


def test_the_counts_stay_where_they_are():
    """No copy of a whole array: [rows, vocab] is large."""
    counts, zeros = counts_of(64, 5000), jnp.zeros(2, jnp.int32)
    options = options_of([SamplingParams(repetition_penalty=2.0)] * 2, 5000)
    program = sample.lower(logits_of(2, 5000), options, zeros, counts, zeros, zeros).compile()
    assert program.as_text().splitlines()[0].count("-alias") == 2
    assert program.memory_analysis().temp_size_in_bytes < counts.generated.nbytes


def test_penalties_need_counts():
    options, zero = options_of([SamplingParams(presence_penalty=0.1)]), jnp.array([0])
    with pytest.raises(AssertionError, match="penalties need the counts of the texts"):
        sample(logits_of(1), options, zero, None, zero, zero)


def test_a_tiny_temperature_takes_the_likeliest():
    logits = 1e4 * logits_of(1)
    assert draw(logits, options_of([SamplingParams(temperature=1e-30)])).token == logits.argmax()


def test_seed_and_position_change_the_draw():
    logits = jnp.zeros((1, 10_000))

    def token(seed: int, position: int) -> int:
        options = options_of([SamplingParams(temperature=1.0, seed=seed)], 10_000)
        return int(draw(logits, options, jnp.array([position])).token[0])

    assert len({token(seed, position) for seed in range(4) for position in range(4)}) == 16
    assert token(3, 2) == token(3, 2)


def test_greedy_rows_and_greedy_function():
    logits = logits_of(4)
    expected = sample_greedy(logits, top=3)
    np.testing.assert_array_equal(expected.token, jnp.argmax(logits, axis=-1))
    assert expected.token.dtype == jnp.int32
    mixed = [SamplingParams(), SamplingParams(temperature=1.0, seed=9)] * 2
    sampled = draw(logits, options_of(mixed), top=3)
    np.testing.assert_array_equal(sampled.token[::2], expected.token[::2])
    np.testing.assert_array_equal(sampled.logprob[::2], expected.logprob[::2])
    np.testing.assert_array_equal(sampled.top_tokens, expected.top_tokens)
    np.testing.assert_array_equal(sampled.top_logprobs, expected.top_logprobs)


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = jnp.array([[0.0, 2.0, 2.0], [-0.0, 0.0, -1.0]])
    options = options_of([SamplingParams()] * 2, 3)
    for sampled in (sample_greedy(logits, top=3), draw(logits, options, top=3)):
        np.testing.assert_array_equal(sampled.token, [1, 0])
        np.testing.assert_array_equal(sampled.top_tokens[0], [1, 2, 0])


def test_log_probabilities_are_those_of_the_model():
    """Whatever was changed before the choice; the likeliest come highest first."""
    rows = len(PARAMS)
    logits, zeros = logits_of(rows), jnp.zeros(rows, jnp.int32)
    places = jnp.arange(rows)
    sampled, _ = sample(logits, options_of(PARAMS), zeros, counts_of(rows), places, zeros, top=5)
    expected = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(
        sampled.logprob, expected[places, sampled.token], rtol=1e-5, atol=1e-6
    )
    order = np.argsort(-expected, axis=-1)[:, :5]
    np.testing.assert_array_equal(sampled.top_tokens, order)
    np.testing.assert_allclose(
        sampled.top_logprobs, np.take_along_axis(expected, order, -1), rtol=1e-5, atol=1e-6
    )
    assert sampled.top_tokens.dtype == jnp.int32
    assert sampled.logprob.dtype == sampled.top_logprobs.dtype == jnp.float32


@pytest.mark.parametrize("top", [0, 1, 20])
def test_width_of_the_likeliest(top):
    for sampled in (
        sample_greedy(logits_of(2), top),
        draw(logits_of(2), options_of(PARAMS[:2]), top=top),
    ):
        assert sampled.top_tokens.shape == sampled.top_logprobs.shape == (2, top)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_unusable_logits_show_in_the_log_probability_of_their_row_only(bad):
    options = options_of([PARAMS[0], PARAMS[5], PARAMS[5]])
    logits = logits_of(3).at[:2, 11].set(bad)
    for sampled in (draw(logits, options, top=2), sample_greedy(logits, 2)):
        np.testing.assert_array_equal(np.isnan(sampled.logprob), [True, True, False])
        assert np.isnan(sampled.top_logprobs[:2]).all()
        assert np.isfinite(sampled.top_logprobs[2]).all()
        assert ((sampled.token >= 0) & (sampled.token < VOCAB)).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_possible_tokens_has_no_log_probability(temperature):
    """The mask allows only what the model itself excludes."""
    logits = logits_of(2).at[0, 7].set(-jnp.inf)
    allowed = jnp.zeros((2, VOCAB), bool).at[:, 7].set(True)
    options, zeros = options_of([SamplingParams(temperature=temperature)] * 2), jnp.array([0, 0])
    sampled, _ = sample(logits, options, zeros, None, zeros, zeros, allowed)
    np.testing.assert_array_equal(np.isnan(sampled.logprob), [True, False])
    assert sampled.token[1] == 7


def test_draws_follow_the_filtered_distribution():
    draws, vocab = 20_000, 12
    params = SamplingParams(temperature=0.8, top_k=9, top_p=0.97, seed=5)
    logits = logits_of(1, vocab, seed=3) / 3
    options = options_of([params], vocab)
    expected = np.asarray(jax.nn.softmax(filter_logits(logits, options)[0]))
    rows = jax.tree.map(lambda x: jnp.repeat(x, draws, axis=0), options)
    places = jnp.arange(draws, dtype=jnp.int32)
    sampled = draw(jnp.broadcast_to(logits, (draws, vocab)), rows, places)
    counts = np.bincount(np.asarray(sampled.token), minlength=vocab)
    possible = expected > 0
    assert 3 < possible.sum() < vocab
    assert counts[~possible].sum() == 0
    chi_square = ((counts - draws * expected) ** 2)[possible] / (draws * expected[possible])
    degrees = possible.sum() - 1
    # Four standard deviations above the mean of the chi-square distribution.
    assert chi_square.sum() < degrees + 4 * np.sqrt(2 * degrees)


def test_options_of_the_same_kind_share_a_program():
    traces = []

    @jax.jit
    def counted(*arguments):
        traces.append(1)
        return sample(*arguments)

    warm = [{"temperature": 0.3 + i, "top_k": 1 + i, "seed": i} for i in range(5)]
    zero = jnp.array([0])
    for step, wishes in enumerate(warm):
        options = options_of([SamplingParams(**wishes)])
        counted(logits_of(1), options, jnp.array([step]), None, zero, zero)
    assert len(traces) == 1
