import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from moe_jax.decoding.beam_search import (
    BeamOptions,
    BeamState,
    Candidates,
    Hypothesis,
    advance,
    results,
    start,
)


def random_table(seed: int, vocab: int, steps: int) -> np.ndarray:
    """Log-probabilities of a tiny model [step, last token, next token]; each text starts with 0."""
    logits = 2 * np.random.default_rng(seed).standard_normal((steps, vocab, vocab))
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


def last_tokens(state: BeamState) -> np.ndarray:
    return state.tokens[:, -1] if state.tokens.size else np.zeros(len(state.scores), np.int32)


def find_candidates(state: BeamState, table: np.ndarray, options: BeamOptions) -> Candidates:
    """The best of all continuations, as many as there must be."""
    step = state.tokens.shape[1]
    log_p = table[step, last_tokens(state)].copy()
    if step < options.min_tokens:
        log_p[:, sorted(options.eos)] = -np.inf
    total = state.scores[:, None] + log_p
    order = np.argsort(-total, axis=None, kind="stable")
    order = order[: max(2, 1 + len(options.eos)) * options.num_beams]
    beam, token = (part.astype(np.int32) for part in np.unravel_index(order, total.shape))
    return Candidates(total[beam, token], beam, token)


def search(table: np.ndarray, options: BeamOptions) -> list[Hypothesis]:
    state, over = start(options), False
    while not over:
        before = state
        state, parent, token, over = advance(state, find_candidates(state, table, options), options)
        np.testing.assert_array_equal(state.tokens[:, :-1], before.tokens[parent])
        np.testing.assert_array_equal(state.tokens[:, -1], token)
    return results(state, options)


def search_plainly(table: np.ndarray, options: BeamOptions) -> list[Hypothesis]:
    """The definition, with lists of texts and all their continuations."""
    running, finished = [(np.float32(0), ())], []
    worth = lambda score, length: float(score) / length**options.length_penalty
    for length in itertools.count(1):
        found = []
        for score, text in running:
            log_p = table[length - 1, text[-1] if text else 0]
            allowed = [
                t for t in range(len(log_p)) if t not in options.eos or length > options.min_tokens
            ]
            found += [(score + log_p[t], (*text, t)) for t in allowed]
        found.sort(key=lambda pair: -pair[0])
        ended = lambda text: text[-1] in options.eos or len(text) == options.limit
        new = [(worth(s, length), text) for s, text in found[: options.num_beams] if ended(text)]
        finished = sorted(finished + new, key=lambda pair: -pair[0])[: options.num_beams]
        running = [pair for pair in found if not ended(pair[1])][: options.num_beams]
        full = len(finished) == options.num_beams
        far = options.early_stopping == "never" and options.length_penalty > 0
        best = worth(running[0][0], options.limit if far else length) if running else -np.inf
        if best <= (finished[-1][0] if full else -1e9) or (full and options.early_stopping is True):
            return [Hypothesis(text, score) for score, text in finished[: options.num_return]]


@st.composite
def wishes(draw) -> tuple[int, BeamOptions]:
    vocab = draw(st.integers(2, 7))
    beams = draw(st.integers(2, 6))
    return vocab, BeamOptions(
        num_beams=beams,
        limit=draw(st.integers(1, 7)),
        num_return=draw(st.integers(1, beams)),
        length_penalty=draw(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])),
        early_stopping=draw(st.sampled_from([False, True, "never"])),
        eos=draw(st.frozensets(st.integers(0, vocab - 1), max_size=min(3, vocab - 1))),
        min_tokens=draw(st.integers(0, 3)),
    )


@hypothesis.settings(max_examples=400)
@hypothesis.given(seed=st.integers(0, 10_000), wish=wishes())
def test_search_follows_the_definition(seed, wish):
    vocab, options = wish
    table = random_table(seed, vocab, options.limit)
    assert search(table, options) == search_plainly(table, options)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(10))
def test_with_beams_for_everything_the_best_of_all_texts_is_found(seed, length_penalty):
    vocab, limit, eos = 3, 3, 1
    table = random_table(seed, vocab, limit)
    texts = {}
    for text in itertools.product(range(vocab), repeat=limit):
        text = text[: text.index(eos) + 1] if eos in text else text
        steps = enumerate(itertools.pairwise((0, *text)))
        total = sum(float(table[step, last, token]) for step, (last, token) in steps)
        texts[text] = total / len(text) ** length_penalty
    options = BeamOptions(
        num_beams=27,
        limit=limit,
        length_penalty=length_penalty,
        early_stopping="never",
        eos=frozenset([eos]),
    )
    (found,) = search(table, options)
    assert found.tokens == max(texts, key=texts.__getitem__)
    assert found.score == pytest.approx(texts[found.tokens], rel=1e-5)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("seed", range(5))
def test_one_beam_is_greedy(seed, early_stopping):
    table = random_table(seed, 5, 9)
    options = BeamOptions(
        num_beams=1,
        limit=9,
        length_penalty=2.0,
        early_stopping=early_stopping,
        eos=frozenset([2, 3]),
        min_tokens=2,
    )
    text = []
    while len(text) < 9 and not (text and text[-1] in options.eos):
        log_p = table[len(text), text[-1] if text else 0].copy()
        log_p[[2, 3]] -= np.inf if len(text) < 2 else 0
        text.append(int(log_p.argmax()))
    assert [found.tokens for found in search(table, options)] == [tuple(text)]


def make(*candidates: tuple[float, int, int]) -> Candidates:
    """Candidates from (score, beam, token)."""
    score, beam, token = zip(*candidates, strict=True)
    return Candidates(*(np.array(x, d) for x, d in zip((score, beam, token), "fii", strict=True)))


EOS = 9
FIRST = make((-0.1, 0, EOS), (-1.0, 0, 3), (-2.0, 0, 4), (-3.0, 0, 5))


def wish(**options) -> BeamOptions:
    return BeamOptions(**{"num_beams": 2, "limit": 8, "eos": frozenset([EOS]), **options})


def test_an_eos_in_the_first_step_is_kept_while_the_others_run_on():
    state, parent, token, over = advance(start(wish()), FIRST, wish())
    assert not over
    assert state.finished == (Hypothesis((EOS,), pytest.approx(-0.1)),)
    assert state.tokens.tolist() == [[3], [4]]
    assert (parent.tolist(), token.tolist()) == ([0, 0], [3, 4])
    np.testing.assert_allclose(state.scores, [-1.0, -2.0])


def test_an_end_below_the_best_num_beams_is_forgotten():
    found = make((-0.1, 0, 3), (-1.0, 0, 4), (-2.0, 0, EOS), (-3.0, 0, 5))
    state, *_ = advance(start(wish()), found, wish())
    assert state.finished == ()
    assert state.tokens.tolist() == [[3], [4]]


SECOND = make((-1.2, 0, EOS), (-1.3, 0, 3), (-1.4, 1, 4), (-2.5, 1, EOS))


@pytest.mark.parametrize(
    ("options", "over"),
    [
        ({"early_stopping": True}, True),
        ({"early_stopping": True, "num_beams": 3}, False),  # one finished text is missing
        ({"early_stopping": False}, True),  # -1.3 / 2 is less than -1.2 / 2
        ({"early_stopping": "never"}, False),  # -1.3 / 8 is more
        ({"early_stopping": "never", "length_penalty": 0.0}, True),
        ({"early_stopping": "never", "length_penalty": -1.0}, True),
    ],
)
def test_when_a_search_is_over(options, over):
    options = wish(**options)
    state, *_ = advance(start(options), FIRST, options)
    *_, actual = advance(state, SECOND, options)
    assert actual == over


@pytest.mark.parametrize("early_stopping", [False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0])
def test_a_search_goes_on_while_a_beam_is_worth_more_than_the_worst_finished_text(
    early_stopping, length_penalty
):
    options = wish(early_stopping=early_stopping, length_penalty=length_penalty)
    state, *_ = advance(start(options), FIRST, options)
    found = make((-1.2, 0, 3), (-1.3, 0, EOS), (-1.4, 1, 4), (-2.5, 1, EOS))
    state, _, _, over = advance(state, found, options)
    assert not over
    assert [text.tokens for text in state.finished] == [(EOS,), (3, EOS)]


def test_a_search_is_over_where_the_best_beam_is_worth_as_much_as_the_worst_finished_text():
    options = wish(length_penalty=0.0)
    state, *_ = advance(start(options), FIRST, options)
    found = make((-1.2, 0, 3), (-1.2, 0, EOS), (-1.4, 1, 4), (-2.5, 1, EOS))
    *_, over = advance(state, found, options)
    assert over


def test_at_the_limit_every_candidate_ends():
    options = wish(limit=1, num_return=2)
    state, _, _, over = advance(start(options), FIRST, options)
    assert over
    assert [text.tokens for text in results(state, options)] == [(EOS,), (3,)]


def test_of_equal_texts_the_older_comes_first():
    options = wish(length_penalty=0.0, num_return=2, limit=2)
    state, *_ = advance(start(options), FIRST, options)
    found = make((-0.1, 0, EOS), (-1.3, 0, 3), (-1.4, 1, 4), (-2.5, 1, EOS))
    state, *_ = advance(state, found, options)
    assert [text.tokens for text in results(state, options)] == [(EOS,), (3, EOS)]


def test_a_search_that_was_cut_short_gives_its_beams_after_the_finished_texts():
    options = wish(num_return=2)
    assert results(start(options), options) == [Hypothesis((), 0.0)]
    state, *_ = advance(start(options), FIRST, options)
    assert results(state, options) == [
        Hypothesis((EOS,), pytest.approx(-0.1)),
        Hypothesis((3,), pytest.approx(-1.0)),
    ]


def test_a_vocabulary_may_have_fewer_continuations_than_beams():
    options = BeamOptions(num_beams=4, limit=2, num_return=4, eos=frozenset([1]))
    table = random_table(0, 2, 2)
    state, parent, token, over = advance(
        start(options), find_candidates(start(options), table, options), options
    )
    assert not over
    assert state.tokens.tolist() == [[0]] * 4  # beams that do not exist repeat the best
    assert np.isfinite(state.scores).tolist() == [True, False, False, False]
    assert (parent.tolist(), token.tolist()) == ([0] * 4, [0] * 4)
    assert sorted(text.tokens for text in search(table, options)) == [(0, 0), (0, 1), (1,)]


def test_a_search_without_a_beam_is_over():
    options = BeamOptions(num_beams=2, limit=9, num_return=2, eos=frozenset([1]))
    found = make((-0.0, 0, 1), (-np.inf, 0, 0), (-np.inf, 1, 0), (-np.inf, 1, 1))
    state, _, _, over = advance(start(options), found, options)
    assert over
    assert results(state, options) == [Hypothesis((1,), 0.0)]


def test_a_very_negative_length_penalty_ends_a_search_early():
    options = BeamOptions(num_beams=2, limit=9, num_return=2, length_penalty=-40.0)
    state, *_ = advance(start(options), FIRST, options)
    state, _, _, over = advance(state, SECOND, options)
    assert over  # as in transformers, where an unfilled place is worth -1e9
    assert [text.tokens for text in results(state, options)] == [(EOS, EOS), (EOS, 3)]


def test_nan_is_refused():
    with pytest.raises(ValueError, match=r"NaN or infinite logits for new token 0 .*float32"):
        advance(start(wish()), make((np.nan, 0, 1), (np.nan, 0, 2)), wish())
