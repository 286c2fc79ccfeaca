"""Steps that are started before the tokens of the last one are known."""

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.engine import flight as module
from moe_jax.engine.flight import StepClock

VOCAB = 300
TEXT = {"max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tiny):
    """Room for four sequences."""
    return moe_jax.load(tiny, dtype="float32", max_tokens=144, max_seqs=4, progress=False)


@pytest.fixture
def loop(engine):
    """Its loop, which must have given everything back in the end."""
    yield engine._loop
    assert engine._loop.violations() == []
    load = engine.load_now
    assert (load.running, load.waiting, load.free_pages) == (0, 0, load.pages)


@pytest.fixture
def started(loop, monkeypatch):
    """How each step that was started since was started."""
    kinds = []
    begin, begin_ahead = loop._begin, loop._begin_ahead

    def count(kind, original):
        def call(*arguments):
            flight = original(*arguments)
            if flight is not None:
                kinds.append(kind)
            return flight

        return call

    monkeypatch.setattr(loop, "_begin", count("begun", begin))
    monkeypatch.setattr(loop, "_begin_ahead", count("ahead", begin_ahead))
    return kinds


def test_all_steps_but_the_first_two_are_started_ahead(engine, started):
    engine.generate([[5, 6], [7, 8, 9]], **TEXT)
    # The prompts, the first tokens; no step after the one that is known to be the last.
    assert started == ["begun", "begun", *["ahead"] * 10]


def random_requests(rng, count):
    for seed in range(count):
        options = {"max_tokens": int(rng.integers(1, 24)), "seed": seed}
        options |= [
            {},
            {"temperature": 1.0, "top_p": 0.9},
            {"temperature": 1.0, "presence_penalty": 0.5, "logprobs": 2},
            {"repetition_penalty": 1.3},
            {"prompt_lookup": 3},
            {"num_beams": 2},
            {"allowed_tokens": lambda ids: range(len(ids) % 7, 200)},
        ][rng.integers(7)]
        yield rng.integers(1, VOCAB, rng.integers(1, 30)).tolist(), options


def test_texts_are_those_of_steps_that_wait_for_each_other(engine, loop, started, monkeypatch):
    rng = np.random.default_rng(5)
    ends = frozenset(rng.integers(0, VOCAB, 30).tolist())  # many texts end unforeseen
    monkeypatch.setattr(engine, "stop_tokens", ends)
    dropped, after_other = [], engine._observer.after_other
    monkeypatch.setattr(
        engine._observer, "after_other", lambda r=(): dropped.extend(r) or after_other(r)
    )
    for _ in range(16):
        requests = list(random_requests(rng, rng.integers(1, 4)))
        handles = [engine.submit(prompt, **options) for prompt, options in requests]
        for _ in range(rng.integers(0, 6)):
            loop.step()
        if rng.random() < 0.3:
            handles[0].cancel()
        found = [handle.result() for handle in handles]
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_look_ahead", False)
            for (prompt, options), one in zip(requests, found, strict=True):
                expected = engine.generate(prompt, **options)
                if one.finish_reason == "cancelled":
                    assert one.tokens == expected.tokens[: len(one.tokens)]
                else:
                    assert (one.tokens, one.text) == (expected.tokens, expected.text)
                    np.testing.assert_allclose(one.logprobs, expected.logprobs, atol=1e-4)
    assert started.count("ahead") > 60
    assert dropped, "some step was meant to be in vain"


def test_a_text_that_ends_unforeseen_gives_its_pages_back_at_once(engine, started, monkeypatch):
    sampling = {"max_tokens": 12, "temperature": 1.0, "seed": 3}
    tokens = engine.generate([5, 6], **sampling, ignore_eos=True).tokens
    place = next(place for place in range(4, 12) if tokens.index(tokens[place]) == place)
    del started[:]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "stop_tokens", frozenset([tokens[place]]))
        ended = engine.generate([5, 6], **sampling)
    assert ended.tokens == tokens[: place + 1]
    assert started.count("ahead") == place  # the last of them in vain
    load = engine.load_now
    assert (load.running, load.free_pages) == (0, load.pages)
    assert engine.generate([5, 6], **sampling, ignore_eos=True).tokens == tokens


def test_steps_are_started_ahead_while_no_request_that_waits_can_start(engine, loop, started):
    prompts = [[5, index] for index in range(1, 7)]
    alone = [engine.generate(prompt, **TEXT).tokens for prompt in prompts]
    del started[:]
    handles = [engine.submit(prompt, **TEXT) for prompt in prompts]
    loop.step()
    assert engine.load_now.waiting == 2
    while engine.load_now.waiting:
        loop.step()
    assert started == ["begun", "begun", *["ahead"] * 10, "begun"]
    assert [handle.result().tokens for handle in handles] == alone


def test_a_request_that_can_start_is_not_made_to_wait(engine, loop, started, monkeypatch):
    handles = [engine.submit([5, index], **TEXT) for index in range(1, 4)]
    loop.step(), loop.step()
    assert started == ["begun", "begun", "ahead"]
    admission = loop.seating._scheduler.next_admission
    monkeypatch.setattr(loop.seating._scheduler, "next_admission", lambda: None)
    handles.append(engine.submit([5, 4], **TEXT))  # as if its pages were not free yet
    loop.step(), loop.step()
    assert (engine.load_now.waiting, started[2:]) == (1, ["ahead"] * 3)
    monkeypatch.setattr(loop.seating._scheduler, "next_admission", admission)
    loop.step(), loop.step()
    assert (engine.load_now.waiting, started[5:]) == (0, ["begun"])
    assert all(len(handle.result().tokens) == 12 for handle in handles)


def test_a_request_is_stopped_where_pages_run_out_as_ever(tiny):
    sizes = {"dtype": "float32", "max_tokens": 144, "max_seqs": 4, "progress": False}
    crowded = moe_jax.load(tiny, expected_share=0.1, **sizes)
    prompts = [[5] * 60, [6] * 60, [7] * 60]  # four pages each, of twelve
    together = crowded.generate(prompts, max_tokens=24, ignore_eos=True)
    assert crowded.stats.restarts > 0
    assert crowded._loop.violations() == []
    alone = [crowded.generate(prompt, max_tokens=24, ignore_eos=True) for prompt in prompts]
    assert [one.tokens for one in together] == [one.tokens for one in alone]


def test_an_error_of_a_step_started_ahead_ends_its_requests(engine, loop, monkeypatch):
    handle = engine.submit([5, 6], **TEXT)
    for _ in range(3):
        loop.step()
    original, calls = engine._loop.runner.step, []

    def fail(*arguments):
        calls.append(original(*arguments))
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(loop.runner, "step", fail)
        with pytest.raises(RuntimeError, match="the device is on fire"):
            handle.result()
    assert len(calls) == 1
    assert len(engine.generate([5, 6], **TEXT).tokens) == 12


def test_nothing_is_compiled_for_it(tiny, caplog):
    engine = moe_jax.load(tiny, dtype="float32", max_tokens=48, max_seqs=1, progress=False)
    with jax.log_compiles():
        engine.generate([5, 6], **TEXT)
    assert caplog.text.count("Compiling jit(_embed_step)") == 2  # the prompt's, a decode step's


def test_driven_layers_are_not_started_ahead(tiny):
    driven = moe_jax.load(tiny, dtype="float32", max_tokens=64, executor="driven", progress=False)
    assert not driven._loop._look_ahead


def test_steps_take_the_time_from_one_to_the_next(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    clock = StepClock()

    def measure(idle, seconds, **how):
        now[0] += idle
        clock.start(**how)
        now[0] += seconds
        return clock.stop()

    assert measure(7, 2, ahead=False) == 2  # nothing ran before
    assert measure(0.5, 2, ahead=True) == 2.5
    assert measure(0.5, 1, ahead=True, done=True) == 1.5
    assert measure(50, 0.5, ahead=True, done=True) == 2  # asked for late
    assert measure(50, 3, ahead=False) == 3


def test_a_step_ends_when_it_is_seen_to_be_done(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    clock, there = StepClock(), [False, False, True]
    clock.start(ahead=False)
    clock.watch(lambda: there.pop(0))
    for _ in range(5):  # programs of the next one are started
        now[0] += 1
        clock.look()
    assert clock.stop() == 3
    clock.start(ahead=True)
    clock.look()  # nothing is watched: not even the step before
    now[0] += 4
    assert clock.stop() == 6


def test_the_end_of_a_step_is_looked_for_while_the_next_is_started(tiny, monkeypatch):
    engine = moe_jax.load(tiny, dtype="float32", max_tokens=64, max_seqs=1, progress=False)
    looks, watched = [], []
    look, watch = StepClock.look, StepClock.watch
    monkeypatch.setattr(StepClock, "look", lambda clock: (looks.append(clock), look(clock)))
    monkeypatch.setattr(
        StepClock, "watch", lambda clock, done: (watched.append(done), watch(clock, done))
    )
    engine.generate([5, 6], **TEXT)
    assert watched
    assert len(looks) > len(watched) * engine.config.layers
