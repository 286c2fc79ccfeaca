"""Steps compile once, keep their pages in place, and survive being broken off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.engine import runner as runner_module
from moe_jax.engine.batch import NewTokens
from moe_jax.model.compiled import LayerProgram
from tests.tolerances import assert_close

TOKENS = np.random.default_rng(2).integers(1, 300, 24)


def pages_of(engine):
    return [leaf for layer in engine._loop.runner._kv for leaf in jax.tree.leaves(layer)]


def test_decode_is_traced_once_per_bucket_in_200_steps(tiny):
    engine = moe_jax.load(tiny, dtype="float32", max_tokens=640, max_seqs=3)
    for count in (1, 3):
        prompts = [[5 + i, 7] for i in range(count)]
        engine.generate(prompts, max_tokens=201, ignore_eos=True)
        engine.generate(prompts, max_tokens=201, ignore_eos=True, temperature=1.0)
    traces = engine.stats.traces
    assert engine.stats.decode_tokens == 2 * 200 * (1 + 3)
    assert {key for key in traces if key[0] == "layer"} == {
        ("layer", tokens, length, slots, None)
        for tokens, length in ((32, 32), (1, 1), (4, 1))
        for slots in (4, None)
    }
    assert set(traces.values()) == {1}


def test_steps_write_the_pages_in_place(engine):
    engine.generate([5, 6], max_tokens=2)
    before = pages_of(engine)
    addresses = [page.unsafe_buffer_pointer() for page in before]
    assert len(before) == 2 * engine.config.layers
    engine.generate([5, 6, 7], max_tokens=3)
    assert all(page.is_deleted() for page in before)
    assert [page.unsafe_buffer_pointer() for page in pages_of(engine)] == addresses


def test_an_abandoned_stream_leaves_nothing_behind(engine):
    expected = engine.logits(TOKENS)
    stream = engine.stream(TOKENS[:4].tolist(), max_tokens=30, ignore_eos=True)
    next(stream), next(stream)
    stream.close()
    np.testing.assert_array_equal(engine.logits(TOKENS), expected)


@pytest.mark.parametrize(
    "method, calls", [("__call__", 1), ("__call__", 2), ("__call__", 5), ("extend_kv", 1)]
)
def test_an_interrupted_step_leaves_a_working_engine(engine, monkeypatch, method, calls):
    expected = engine.logits(TOKENS)
    totals = engine.stats
    original, made = getattr(LayerProgram, method), []

    def interrupted(self, *arguments):
        result = original(self, *arguments)
        made.append(None)
        if len(made) == calls:
            # The pages are donated by now, and nobody has taken the new ones.
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(LayerProgram, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(TOKENS[:4].tolist(), max_tokens=8, ignore_eos=True)
    assert engine.stats.resident >= totals.resident
    np.testing.assert_array_equal(engine.logits(TOKENS), expected)


@pytest.mark.parametrize("use", ["generate", "logits", "routing"])
def test_a_stream_goes_on_when_the_engine_is_used_for_something_else(engine, use):
    prompt = TOKENS[:4].tolist()
    alone = engine.generate(prompt, max_tokens=6, ignore_eos=True).tokens
    stream = engine.stream(prompt, max_tokens=6, ignore_eos=True)
    first = next(stream)
    getattr(engine, use)(np.array([5, 6]))
    assert (first.token, *(piece.token for piece in stream)) == alone


def test_two_streams_are_read_by_turns(engine):
    prompts = [TOKENS[:4].tolist(), TOKENS[4:7].tolist()]
    alone = [engine.generate(p, max_tokens=6, ignore_eos=True).tokens for p in prompts]
    streams = [engine.stream(p, max_tokens=6, ignore_eos=True) for p in prompts]
    found = [[piece.token for piece in pieces] for pieces in zip(*streams, strict=True)]
    assert [tuple(tokens) for tokens in zip(*found, strict=True)] == alone


def test_chunks_and_decode_give_the_logits_of_one_forward(engine):
    tokens = [*TOKENS.tolist(), *TOKENS[:12].tolist()]
    pages = np.arange(engine._loop.runner.pages, dtype=np.int32)
    step = lambda first, last: NewTokens(tokens[first:last], first, len(tokens), pages)
    runner = engine._loop.runner
    parts = [runner.all_logits(step(0, 13)), runner.all_logits(step(13, 33))]
    parts += [np.asarray(runner.step([step(i, i + 1)], [0])) for i in range(33, 36)]
    expected = engine.logits(tokens)
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-5 * abs(expected).max())


def test_a_prompt_longer_than_the_largest_bucket_is_prefilled_in_chunks(tiny, monkeypatch):
    tokens = np.random.default_rng(4).integers(1, 300, 530).tolist()
    engine = moe_jax.load(tiny, dtype="float32", max_tokens=640, max_seqs=1, progress=False)
    logits = engine.logits(tokens)
    text = engine.generate(tokens, max_tokens=4, ignore_eos=True)
    assert {key[1] for key in engine.stats.traces if key[0] == "layer"} == {512, 32, 1}
    monkeypatch.setattr(runner_module, "PREFILL_BUCKETS", (640,))
    np.testing.assert_allclose(logits, engine.logits(tokens), atol=1e-5 * abs(logits).max())
    assert text.tokens == engine.generate(tokens, max_tokens=4, ignore_eos=True).tokens


@pytest.fixture(scope="module", params=["static", "lfru"])
def four(tiny, request):
    """Room for four sequences, their texts and their pages."""
    options = {"max_tokens": 128, "max_seqs": 4, "residency": request.param}
    engine = moe_jax.load(tiny, dtype="float32", progress=False, **options)
    texts = np.random.default_rng(5).integers(1, 300, (4, 24)).tolist()
    return engine, texts, np.arange(8, dtype=np.int32).reshape(4, 2)


# Of each text: where its new tokens begin and end, and after how many of the last ones logits are
# wanted. Texts that begin late have been read up to there; several wanted ones were guessed.
# And how many rows of logits there are then.
MIXED = {
    "a_whole_prompt": ([(0, 13, 1)], 1),
    "a_part_of_a_prompt": ([(0, 13, 0)], 0),
    "two_ends": ([(0, 13, 1), (4, 9, 1)], 2),
    "an_end_beside_decoding": ([(0, 13, 1), (0, 7, 0), (11, 12, 1)], 2),
    "everything": ([(0, 13, 1), (0, 7, 0), (11, 12, 1), (20, 23, 3)], 4 * 8),
}


@pytest.mark.parametrize("parts, rows", MIXED.values(), ids=MIXED)
def test_a_prompt_runs_its_last_layer_for_what_is_wanted(four, parts, rows):
    engine, texts, pages = four
    runner, config = engine._loop.runner, engine.config
    new = lambda i, start, end: NewTokens(
        texts[i][start:end], start, 24, pages[i], verify=parts[i][2] > 1
    )
    expected, batch, wanted = [], [], []
    for i, (start, end, count) in enumerate(parts):
        everything = runner.all_logits(new(i, 0, end))
        expected += list(everything[end - count :][:count])
        batch.append(new(i, start, end))
        total = sum(len(one.tokens) for one in batch)
        wanted += range(total - count, total)
    floats = lambda: [np.asarray(page).view(np.float32) for page in pages_of(engine)]
    before = floats()
    runner.take_reports()
    found = np.asarray(runner.step(batch, wanted))
    assert len(found) == rows and np.isfinite(found).all()
    if wanted:
        assert_close(found[: len(wanted)], np.stack(expected))
    (report,) = runner.take_reports()
    routed = report.read().tally.counts.sum(axis=1) / config.moe.experts_per_token
    *earlier, last = routed[np.asarray(config.moe_layers)]
    assert earlier == [len(np.concatenate([one.tokens for one in batch]))] * len(earlier)
    moves = engine._observer.mover.residency.policy.moves
    assert last == (earlier[0] if moves else len(wanted))
    for page, was in zip(floats(), before, strict=True):
        np.testing.assert_allclose(page, was, atol=1e-5)


def test_a_long_prompt_leaves_its_keys_in_every_layer(four):
    engine, texts, pages = four
    runner = engine._loop.runner
    new = lambda start, end: NewTokens(texts[0][start:end], start, 24, pages[0])
    expected = runner.all_logits(new(0, 24))[-1]
    nan = np.float32(np.nan).view(np.uint32)
    runner._kv = jax.tree.map(lambda page: jnp.full_like(page, nan), runner._kv)
    assert runner.step([new(0, 9)], []).shape == (0, engine.config.vocab)
    runner.step([new(9, 20)], [])
    assert_close(np.asarray(runner.step([new(20, 24)], [3]))[0], expected)
