"""Steps compile once, keep their pages in place, and survive being broken off."""

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.engine import runner as runner_module
from moe_jax.engine.batch import NewTokens, pack_step
from moe_jax.model.compiled import LayerProgram

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


@pytest.mark.parametrize("calls", [1, 2, 5], ids=lambda n: f"after_call_{n}")
def test_an_interrupted_step_leaves_a_working_engine(engine, monkeypatch, calls):
    expected = engine.logits(TOKENS)
    totals = engine.stats
    original, made = LayerProgram.__call__, []

    def interrupted(self, *arguments):
        result = original(self, *arguments)
        made.append(None)
        if len(made) == calls:
            # The pages are donated by now, and nobody has taken the new ones.
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(LayerProgram, "__call__", interrupted)
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


def test_packing_lays_sequences_end_to_end():
    pages = np.array([[3, 9], [4, 5]], np.int32)
    batch = [NewTokens([7, 8], 4, 6, pages[0]), NewTokens([9], 0, 1, pages[1])]
    step = pack_step(batch, tokens=5, seqs=4)
    assert step.tokens.tolist() == [7, 8, 9, 0, 0]
    assert step.query_starts.tolist() == [0, 2, 3, 3, 3]
    assert step.kv_lengths.tolist() == [6, 1, 0, 0]
    assert step.rope_lengths.tolist() == [6, 1, 1, 1]
    assert step.block_tables.tolist() == [[3, 9], [4, 5], [0, 0], [0, 0]]
