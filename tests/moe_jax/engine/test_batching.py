"""Requests that run together give what each gives alone, whatever the KV cache does to them."""

import numpy as np
import pytest

import moe_jax
from moe_jax.engine import seating

VOCAB = 300
# Of both engines, so that both run the same programs.
SIZES = {"dtype": "float32", "max_tokens": 144, "max_seqs": 4, "progress": False}


@pytest.fixture(scope="module")
def crowded(tiny):
    """Room for four sequences and 12 pages of tokens, given to requests as if they ended early."""
    return moe_jax.load(tiny, expected_share=0.1, **SIZES)


@pytest.fixture(scope="module")
def alone(tiny):
    """The same model, for one request after another, without anything shared between them."""
    return moe_jax.load(tiny, **SIZES)


def mixed_requests(count):
    """Prompts with common beginnings and others, every kind of sampling, and some beams."""
    rng = np.random.default_rng(7)
    beginnings = [rng.integers(1, VOCAB, size).tolist() for size in (16, 33, 70)]
    for index in range(count):
        prompt = rng.integers(1, VOCAB, rng.integers(1, 40)).tolist()
        if rng.random() < 0.6:
            prompt = beginnings[rng.integers(3)] + prompt
        options = {"max_tokens": int(rng.integers(1, 32)), "seed": index}
        kind = rng.integers(6)
        if kind == 0:
            options |= {"temperature": 1.0, "top_p": 0.9}
        elif kind == 1:
            options |= {"temperature": 0.7, "top_k": 20, "presence_penalty": 0.5}
        elif kind == 2:
            options |= {"repetition_penalty": 1.3, "ignore_eos": True}
        elif kind == 3:
            options |= {"prompt_lookup": 4, "ignore_eos": True}
        elif kind == 4:
            options |= {"logprobs": 3, "min_tokens": min(5, options["max_tokens"])}
        yield prompt, options | {"priority": int(rng.integers(2))}


def first_difference(one, other):
    pairs = zip(one.tokens, other.tokens, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def near_tie(engine, prompt, completion, place):
    """Whether the two best logits at this place of a text are within 1e-5."""
    logits = engine.logits([*prompt, *completion.tokens[:place]])[-1]
    second, first = np.sort(logits)[-2:]
    return first - second < 1e-5


def test_two_hundred_requests_give_what_each_gives_alone(crowded, alone, record_property):
    rng = np.random.default_rng(1)
    requests = list(mixed_requests(200))
    handles, ties = [], 0
    for prompt, options in requests:
        handles.append(crowded.submit(prompt, **options))
        for _ in range(rng.integers(0, 4)):  # they arrive while others run
            crowded._loop.step()
    for (prompt, options), handle in zip(requests, handles, strict=True):
        together, single = handle.result(), alone.generate(prompt, **options)
        if together.tokens != single.tokens:
            place = first_difference(together, single)
            assert near_tie(alone, prompt, single, place), (prompt, options)
            ties += 1
            continue
        assert together.text == single.text
        assert together.finish_reason == single.finish_reason
        np.testing.assert_allclose(together.logprobs, single.logprobs, atol=1e-4)
        assert [[t for t, _ in top] for top in together.top_logprobs] == [
            [t for t, _ in top] for top in single.top_logprobs
        ]
    record_property("near_ties", ties)
    assert ties <= 2
    stats = crowded.stats
    assert stats.restarts > 20, "the cache was meant to be too small"
    assert stats.cached_tokens > 1000, "prompts were meant to be shared"
    assert crowded._loop.violations() == []
    load = crowded.load_now
    assert (load.running, load.waiting, load.free_pages) == (0, 0, load.pages)


def test_programs_stay_few(crowded):
    """Whatever arrived so far: as many shapes as there are buckets, each compiled once."""
    crowded.generate([[5, 6]] * 7, max_tokens=3)
    traces = crowded.stats.traces
    shapes = {key[1:3] for key in traces if key[0] == "layer"}
    decode = {(1, 1), (2, 1), (4, 1)}
    verify = {(8 * tokens, 8) for tokens, _ in decode}
    assert shapes <= decode | verify | {(32, 32), (128, 128), (512, 512)}
    assert set(traces.values()) == {1}


def test_a_prompt_that_was_read_is_not_read_again(alone):
    prompt = np.random.default_rng(3).integers(1, VOCAB, 101).tolist()
    first = alone.generate(prompt, max_tokens=20, ignore_eos=True)
    before = alone.stats
    second = alone.generate(prompt, max_tokens=20, ignore_eos=True)
    assert (first.cached_tokens, second.cached_tokens) == (0, 96)
    assert alone.stats.since(before).prompt_tokens == 5
    assert second.tokens == first.tokens
    # What was generated is shared as well.
    longer = alone.generate([*prompt, *first.tokens], max_tokens=3, ignore_eos=True)
    assert longer.cached_tokens == 112


def test_of_a_prompt_of_full_pages_the_last_is_computed(alone):
    prompt = np.random.default_rng(4).integers(1, VOCAB, 64).tolist()
    expected = alone.generate(prompt, max_tokens=5, ignore_eos=True).tokens
    again = alone.generate(prompt, max_tokens=5, ignore_eos=True)
    assert (again.cached_tokens, again.tokens) == (48, expected)


def test_sharing_can_be_switched_off(tiny):
    engine = moe_jax.load(tiny, share_prefixes=False, **SIZES)
    found = [engine.generate([5] * 40, max_tokens=2, ignore_eos=True) for _ in range(2)]
    assert [one.cached_tokens for one in found] == [0, 0]
    assert found[0].tokens == found[1].tokens


def test_decoding_goes_on_beside_a_long_prompt(tiny, monkeypatch):
    monkeypatch.setattr(seating, "PREFILL_BUCKETS", (32,))  # tokens in a step
    engine = moe_jax.load(tiny, **SIZES)
    prompt = [7] * 70
    short = engine.submit([5, 6], max_tokens=40, ignore_eos=True)
    for _ in range(3):
        engine._loop.step()
    long = engine.submit(prompt, max_tokens=2, ignore_eos=True)
    read = short.generated_tokens
    while not long.generated_tokens:
        engine._loop.step()
        assert short.generated_tokens == read + 1, "a step gave a running request no token"
        read += 1
    assert read == 3 + 1 + 3  # one step had been started already
    assert long.result().tokens == engine.generate(prompt, max_tokens=2, ignore_eos=True).tokens


def test_timing_tells_waiting_from_running(alone):
    handles = [alone.submit([5, 6], max_tokens=8, ignore_eos=True) for _ in range(5)]
    times = [handle.result().timing for handle in handles]
    for t in times:
        assert 0 <= t.queued < t.first_token < t.total
        assert t.per_token * 7 == pytest.approx(t.total - t.first_token, rel=0.2)
    assert times[4].queued > times[0].first_token  # there are four seats


def test_a_single_token_has_no_time_per_token(alone):
    assert alone.generate([5, 6], max_tokens=1).timing.per_token is None
