"""Beam search through the engine: pages, mates and restarts change no text."""

import numpy as np
import pytest

import moe_jax

PROMPTS = [[5, 6, 7], list(range(20, 61)), [9] * 16]
OPTIONS = {"num_beams": 4, "num_return": 3, "max_tokens": 12}


@pytest.fixture(scope="module")
def beaming(tiny):
    """Seats for two searches of four beams, and few pages."""
    return moe_jax.load(tiny, dtype="float32", max_tokens=260, max_seqs=9, progress=False)


@pytest.fixture(scope="module")
def alone(beaming):
    return [beaming.generate(prompt, **OPTIONS) for prompt in PROMPTS]


def log_probabilities(engine, prompt, tokens):
    logits = engine.logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :].astype(np.float64)
    chosen = logits[range(len(tokens)), tokens]
    return chosen - np.log(np.exp(logits).sum(-1))


def test_scores_are_those_of_the_model(beaming, alone):
    for prompt, found in zip(PROMPTS, alone, strict=True):
        assert [one.score for one in found] == sorted((o.score for o in found), reverse=True)
        assert len({one.tokens for one in found}) == len(found) == 3
        for one in found:
            expected = log_probabilities(beaming, prompt, one.tokens)
            np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)
            assert one.score == pytest.approx(expected.sum() / len(one.tokens), abs=1e-4)


def test_more_beams_find_no_worse_text(beaming, alone):
    greedy = beaming.generate(PROMPTS[1], max_tokens=12)
    assert alone[1][0].score >= sum(greedy.logprobs) / len(greedy.tokens)


def test_searches_run_together_and_beside_other_requests(beaming, alone):
    """Two of the three searches fit at a time."""
    other = beaming.submit([3, 4], max_tokens=30, temperature=1.0, ignore_eos=True)
    together = beaming.generate(PROMPTS, **OPTIONS)
    tokens = lambda found: [[one.tokens for one in group] for group in found]
    assert tokens(together) == tokens(alone)
    expected = beaming.generate([3, 4], max_tokens=30, temperature=1.0, ignore_eos=True)
    assert other.result().tokens == expected.tokens
    assert beaming._loop.violations() == []
    load = beaming.load_now
    assert (load.running, load.free_pages) == (0, load.pages)


def test_a_prompt_is_read_once_for_all_beams(beaming):
    prompt = np.random.default_rng(8).integers(1, 300, 50).tolist()
    before = beaming.stats
    beaming.generate(prompt, **OPTIONS)
    assert beaming.stats.since(before).prompt_tokens == 50
    (found, *_) = beaming.generate(prompt, **OPTIONS)
    assert found.cached_tokens == 48


def test_pages_stay_within_the_bound_while_beams_fork(beaming):
    """The prompt's full pages once, and for every beam those after them."""
    handle = beaming.submit(PROMPTS[1], num_beams=4, max_tokens=40)
    free = beaming.load_now.pages
    while not handle.done:
        beaming._loop.step()
        free = min(free, beaming.load_now.free_pages)
        assert beaming._loop.violations() == []
    assert beaming.load_now.pages - free <= 2 + 4 * (5 - 2)


def test_a_search_begins_anew_when_its_pages_are_lost(beaming):
    wide = {"num_beams": 8, "max_tokens": 12}
    expected = beaming.generate(PROMPTS[1], **wide)
    handle = beaming.submit(PROMPTS[1], **wide)
    for _ in range(6):
        beaming._loop.step()
    before = beaming.stats.restarts
    beaming.logits(np.arange(1, 261))
    assert beaming.stats.restarts == before + 1
    assert handle.result().tokens == expected.tokens


def test_a_stream_of_a_search_is_its_best_text(beaming, alone):
    (piece,) = beaming.stream(PROMPTS[0], **OPTIONS)
    assert (piece.text, piece.token) == (alone[0][0].text, None)
    assert piece.completion.tokens == alone[0][0].tokens


def test_a_search_can_be_cancelled(beaming):
    handle = beaming.submit(PROMPTS[0], **OPTIONS)
    for _ in range(3):
        beaming._loop.step()
    handle.cancel()
    assert handle.result().finish_reason == "cancelled"
    assert beaming.load_now.free_pages == beaming.load_now.pages


@pytest.mark.parametrize("beams", [1, 2])
def test_several_searches_in_a_list_give_lists(beaming, beams):
    found = beaming.generate(PROMPTS[:2], num_beams=2, num_return=beams, max_tokens=3)
    kinds = {type(one) for one in found}
    assert kinds == ({moe_jax.Completion} if beams == 1 else {list})


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.4}, {"min_tokens": 5}, {"early_stopping": "never"}],
    ids=str,
)
def test_options_reach_the_search(beaming, options):
    plain = beaming.generate(PROMPTS[2], **OPTIONS)
    found = beaming.generate(PROMPTS[2], **OPTIONS, **options)
    if "repetition_penalty" in options:
        assert [one.tokens for one in found] != [one.tokens for one in plain]
    assert all(len(one.tokens) >= options.get("min_tokens", 1) for one in found)
