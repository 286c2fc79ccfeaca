import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.decoding.beam_candidates import (
    beam_candidates,
    by_request,
    stack_beams,
)
from moe_jax.decoding.beam_search import BeamOptions, BeamState, Candidates, advance, start

VOCAB, ROWS = 11, 12

OPTIONS = [
    BeamOptions(num_beams=3, limit=9),
    BeamOptions(num_beams=2, limit=9, eos=frozenset([4, 7, 1]), min_tokens=5),
    BeamOptions(num_beams=4, limit=9, eos=frozenset([0]), repetition_penalty=1.7),
]
PLACES = [[7, 2, 9], [4, 11], [1, 3, 5, 10]]  # padding reads row 0


def random_states() -> list[BeamState]:
    random = np.random.default_rng(1)
    return [
        BeamState(
            -np.sort(3 * random.random(o.num_beams, np.float32)),
            random.integers(0, VOCAB, (o.num_beams, 4), np.int32),
        )
        for o in OPTIONS
    ]


def random_logits() -> np.ndarray:
    """Rows that belong to no beam are NaN."""
    logits = 3 * np.random.default_rng(2).standard_normal((ROWS, VOCAB)).astype(np.float32)
    logits[[row for row in range(ROWS) if row not in {*itertools.chain(*PLACES)}]] = np.nan
    return logits


def seen_in(states: list[BeamState]) -> np.ndarray:
    seen = np.zeros((ROWS, VOCAB), bool)
    for state, rows in zip(states, PLACES, strict=True):
        for row, tokens in zip(rows, state.tokens, strict=True):
            seen[row, tokens] = True
    return seen


def find_plainly(
    logits: np.ndarray, state: BeamState, options: BeamOptions, rows: list[int]
) -> list[tuple[float, int, int]]:
    """The definition: every continuation, sorted."""
    found = []
    for beam, row in enumerate(rows):
        log_p = logits[row] - np.log(np.exp(logits[row].astype(np.float64)).sum())
        log_p[state.tokens[beam]] *= options.repetition_penalty if state.tokens.size else 1
        if state.tokens.shape[1] < options.min_tokens:
            log_p[sorted(options.eos)] = -np.inf
        found += [(state.scores[beam] + p, beam, token) for token, p in enumerate(log_p)]
    found = sorted((f for f in found if f[0] > -np.inf), key=lambda f: (-f[0], *f[1:]))
    return found[: options.num_beams * max(2, 1 + len(options.eos))]


def check(actual: Candidates, expected: list[tuple[float, int, int]]) -> None:
    score, beam, token = zip(*expected, strict=True)
    count = len(expected)
    np.testing.assert_allclose(actual.score[:count], score, rtol=1e-5)
    assert actual.beam[:count].tolist() == list(beam)
    assert actual.token[:count].tolist() == list(token)


def test_candidates_of_several_requests_in_any_rows_follow_the_definition():
    states, logits = random_states(), random_logits()
    batch = stack_beams(states, OPTIONS, PLACES)
    found = by_request(beam_candidates(logits, batch, seen_in(states)))
    for own, state, options, rows in zip(found, states, OPTIONS, PLACES, strict=True):
        check(own, find_plainly(logits, state, options, rows))


@pytest.mark.parametrize("chosen", [[0], [1], [2], [2, 0]])
def test_a_request_has_the_same_candidates_alone(chosen):
    states, logits = random_states(), random_logits()
    take = lambda items: [items[i] for i in chosen]
    seen = seen_in(states)
    together = by_request(beam_candidates(logits, stack_beams(states, OPTIONS, PLACES), seen))
    batch = stack_beams(take(states), take(OPTIONS), take(PLACES))
    for alone, other in zip(
        by_request(beam_candidates(logits, batch, seen)), take(together), strict=True
    ):
        for field, expected in zip(alone, other, strict=True):
            np.testing.assert_array_equal(field, expected)


def test_the_first_step_reads_the_one_row_of_the_prompt():
    options, logits = OPTIONS[0], random_logits()
    batch = stack_beams([start(options)], [options], [[7] * 3])
    (found,) = by_request(beam_candidates(logits, batch))
    check(found, find_plainly(logits, start(options), options, [7]))


def test_without_penalties_seen_may_be_left_out():
    states, logits = random_states(), random_logits()
    batch = stack_beams(states[:1], OPTIONS[:1], PLACES[:1])
    expected = by_request(beam_candidates(logits, batch, seen_in(states)))
    for actual, other in zip(by_request(beam_candidates(logits, batch)), expected, strict=True):
        np.testing.assert_array_equal(actual.score, other.score)
        np.testing.assert_array_equal(actual.token, other.token)


def test_lines_ids_and_candidates_are_padded_to_powers_of_two():
    batch = stack_beams(random_states(), OPTIONS, PLACES)
    assert batch.row.tolist() == [7, 2, 9, 4, 11, 1, 3, 5, 10] + [0] * 7
    assert batch.forbidden.tolist() == [[-1] * 4] * 3 + [[1, 4, 7, -1]] * 2 + [[-1] * 4] * 11
    assert batch.count == 8
    alone = stack_beams([start(OPTIONS[0])], OPTIONS[:1], PLACES[:1])
    assert alone.row.tolist() == [7]
    assert alone.forbidden.shape == (1, 1)


def test_eos_may_be_chosen_after_min_tokens():
    options = BeamOptions(num_beams=2, limit=9, eos=frozenset([3]), min_tokens=4)
    logits = jnp.zeros((2, VOCAB)).at[:, 3].set(50.0)
    state = random_states()[1]  # has four tokens
    (found,) = by_request(beam_candidates(logits, stack_beams([state], [options], [[0, 1]])))
    assert found.token[:2].tolist() == [3, 3]


def test_enough_go_on_where_every_beam_could_end_in_every_way():
    options = BeamOptions(num_beams=2, limit=9, eos=frozenset([3, 5, 6]))
    logits = jnp.zeros((2, VOCAB)).at[:, jnp.array([3, 5, 6])].set(50.0)
    state = random_states()[1]
    (found,) = by_request(beam_candidates(logits, stack_beams([state], [options], [[0, 1]])))
    assert np.isin(found.token, [3, 5, 6]).sum() == 6
    _, _, token, _ = advance(state, found, options)
    assert not np.isin(token, [3, 5, 6]).any()


def test_among_equals_the_lower_beam_then_the_lower_token_comes_first():
    options = BeamOptions(num_beams=2, limit=9)
    state = BeamState(np.zeros(2, np.float32), np.zeros((2, 1), np.int32))
    logits = np.zeros((2, 3), np.float32)
    (found,) = by_request(beam_candidates(logits, stack_beams([state], [options], [[1, 0]])))
    assert found.beam.tolist() == [0, 0, 0, 1]
    assert found.token.tolist() == [0, 1, 2, 0]


def test_where_the_vocabulary_is_too_small_there_are_fewer_candidates():
    options = BeamOptions(num_beams=3, limit=9)
    logits = np.array([[0.0, 1.0, -np.inf]], np.float32)
    batch = stack_beams([start(options)], [options], [[0] * 3])
    (found,) = by_request(beam_candidates(logits, batch))
    assert found.token.tolist() == [1, 0, 2]
    assert np.isfinite(found.score).tolist() == [True, True, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_break_only_the_request_that_reads_them(bad):
    states, logits = random_states(), random_logits()
    logits[11, 5] = bad
    batch = stack_beams(states, OPTIONS, PLACES)
    found = by_request(beam_candidates(logits, batch, seen_in(states)))
    assert [bool(np.isnan(own.score).any()) for own in found] == [False, True, False]
    with pytest.raises(ValueError, match="NaN or infinite logits for new token 4"):
        advance(states[1], found[1], OPTIONS[1])
