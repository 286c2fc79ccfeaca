"""Submitting, cancelling, interrupting and failing; from one thread, many, and event loops."""

import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

import moe_jax
from moe_jax.model.compiled import LayerProgram

PROMPTS = ["many experts", "one mixture", "host; small one", "of them", "on the host, some"]
LONG = {"max_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected(engine):
    return [engine.generate(prompt, **LONG).tokens for prompt in PROMPTS]


@pytest.fixture
def clean(engine):
    """The engine, which must have given everything back in the end."""
    yield engine
    assert engine._loop.violations() == []
    load = engine.load_now
    assert (load.running, load.waiting, load.free_pages) == (0, 0, load.pages)


def test_a_handle_gives_pieces_and_result(clean, expected):
    handle = clean.submit(PROMPTS[0], **LONG)
    assert not handle.done
    pieces = list(handle.pieces())
    assert tuple(piece.token for piece in pieces) == expected[0]
    assert handle.done
    completion = handle.result()
    assert completion.tokens == expected[0]
    assert pieces[-1].completion is completion
    assert [piece.completion for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert handle.result() is completion


def test_a_result_may_be_asked_for_while_pieces_are_unread(clean, expected):
    handle = clean.submit(PROMPTS[0], **LONG)
    handle.next_piece()
    assert handle.result().tokens == expected[0]
    assert len(list(handle.pieces())) == len(expected[0]) - 1


@pytest.mark.parametrize("steps", [0, 1, 4], ids="after_{}_steps".format)
def test_a_cancelled_request_gives_its_pages_back_at_once(clean, expected, steps):
    other = clean.submit(PROMPTS[1], **LONG)
    handle = clean.submit(PROMPTS[0], **LONG)
    for _ in range(steps):
        clean._loop.step()
    handle.cancel()
    completion = handle.result()
    assert completion.finish_reason == "cancelled"
    assert completion.tokens == expected[0][:steps]
    load = clean.load_now
    assert load.running + load.waiting == 1
    handle.cancel()  # nothing happens any more
    assert other.result().tokens == expected[1]


def test_the_last_piece_of_a_cancelled_request_has_no_token(clean):
    stream = clean.submit(PROMPTS[0], **LONG)
    stream.next_piece()
    stream.cancel()
    last = stream.next_piece()
    assert (last.token, last.text, last.finish_reason) == (None, "", "cancelled")
    assert stream.next_piece() is None


def test_bad_options_are_refused_before_anything_is_queued(clean):
    with pytest.raises(ValueError, match="temperature must be a number"):
        clean.submit(PROMPTS[0], temperature=float("nan"))
    for take in (clean.submit, clean.stream, clean.astream, clean.agenerate):
        with pytest.raises(ValueError, match="this takes one prompt, and was given a list"):
            take(PROMPTS)
    with pytest.raises(ValueError, match=r"num_beams=4 needs as many seats, .* max_seqs=3"):
        clean.submit(PROMPTS[0], num_beams=4)
    with pytest.raises(ValueError, match=r"3 beams of 64 tokens .* need 15 KV pages .* has 6"):
        clean.submit([5] * 3, num_beams=3, max_tokens=64)
    with pytest.raises(ValueError, match="logit_bias names token 300"):
        clean.submit(PROMPTS[0], logit_bias={300: 1.0})


def test_an_error_ends_the_requests_of_its_step_and_no_others(clean, monkeypatch, expected):
    original = LayerProgram.__call__
    broken = [clean.submit(prompt, **LONG) for prompt in PROMPTS[:3]]
    waiting = clean.submit(PROMPTS[3], **LONG)

    def fail(self, *arguments):
        original(self, *arguments)
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(LayerProgram, "__call__", fail)
        clean._loop.step()
    for handle in broken:
        with pytest.raises(RuntimeError, match="the device is on fire"):
            handle.result()
    assert waiting.result().tokens == expected[3]


def test_an_error_after_a_step_takes_back_nothing_that_was_given(clean, monkeypatch, expected):
    done = clean.submit(PROMPTS[0], max_tokens=1)
    going = clean.submit(PROMPTS[1], **LONG)

    def fail(*step):
        raise RuntimeError("a policy of the user's own")

    with monkeypatch.context() as patch:
        patch.setattr(clean._loop._observer, "after_step", fail)
        clean._loop.step()
    assert done.result().tokens == expected[0][:1]
    with pytest.raises(RuntimeError, match="a policy of the user's own"):
        going.result()


def test_numbers_that_are_none_end_only_their_request(clean, monkeypatch, expected):
    model = clean._loop.runner.model
    embedding = model.embedding.at[7].set(np.nan)
    monkeypatch.setattr(clean._loop.runner, "model", replace(model, embedding=embedding))
    # Its keys would be NaN for whoever shares its pages; nobody does.
    bad, good = clean.submit([7, 7], **LONG), clean.submit(PROMPTS[2], **LONG)
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        bad.result()
    assert good.result().tokens == expected[2]


@pytest.mark.parametrize("calls", [1, 3, 4, 10], ids="at_layer_call_{}".format)
def test_an_interrupt_ends_a_generation_and_nothing_else(clean, monkeypatch, expected, calls):
    original, made = LayerProgram.__call__, []
    other = clean.submit(PROMPTS[4], **LONG)
    other.next_piece()

    def interrupted(self, *arguments):
        result = original(self, *arguments)
        made.append(None)
        if len(made) == calls:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(LayerProgram, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            clean.generate(PROMPTS[:2], **LONG)
    assert clean.load_now.running + clean.load_now.waiting == 1
    assert other.result().tokens == expected[4]
    assert [c.tokens for c in clean.generate(PROMPTS, **LONG)] == expected


def test_logits_take_pages_from_requests_which_go_on(clean, expected):
    handles = [clean.submit(prompt, **LONG) for prompt in PROMPTS[:3]]
    for _ in range(4):
        clean._loop.step()
    before = clean.stats.restarts
    clean.logits(list(range(1, 64)))
    assert clean.stats.restarts > before
    assert [handle.result().tokens for handle in handles] == expected[:3]


def test_many_threads_share_an_engine(clean, expected):
    found = [None] * len(PROMPTS)

    def run(index):
        found[index] = clean.generate(PROMPTS[index], **LONG).tokens

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_streams_of_an_event_loop_run_together(clean, expected):
    async def read(prompt):
        return tuple([piece.token async for piece in clean.astream(prompt, **LONG)])

    async def main():
        whole = clean.agenerate(PROMPTS[4], **LONG)
        *streamed, last = await asyncio.gather(*map(read, PROMPTS[:4]), whole)
        return [*streamed, last.tokens]

    assert asyncio.run(main()) == expected
    for _ in range(100):  # the thread ends, so that an engine nobody holds can be freed
        if clean._driver._thread is None:
            return
        time.sleep(0.05)
    pytest.fail("the engine's thread stays")


def test_what_is_never_read_is_never_queued(clean):
    async def main():
        clean.astream(PROMPTS[0], **LONG)
        clean.agenerate(PROMPTS[0], **LONG).close()

    asyncio.run(main())


def test_closing_an_async_stream_cancels_it(clean):
    async def main():
        stream = clean.astream(PROMPTS[0], **LONG)
        await anext(stream)
        await stream.aclose()
        for _ in range(100):  # at most one step more
            if not clean.load_now.running:
                return
            await asyncio.sleep(0.01)
        pytest.fail("the request runs on")

    asyncio.run(main())


def test_cancelling_a_task_cancels_its_request(clean):
    async def main():
        task = asyncio.create_task(clean.agenerate(PROMPTS[0], **LONG))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(100):
            if not clean.load_now.running + clean.load_now.waiting:
                return
            await asyncio.sleep(0.01)
        pytest.fail("the request runs on")

    asyncio.run(main())


def test_errors_reach_an_event_loop(clean, monkeypatch):
    def fail(self, *arguments):
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(LayerProgram, "__call__", fail)
    with pytest.raises(RuntimeError, match="the device is on fire"):
        asyncio.run(anext(clean.astream(PROMPTS[0])))
    with pytest.raises(ValueError, match="the prompt is empty"):
        clean.astream([])


def test_progress_is_shown_for_a_list(tiny, capsys):
    engine = moe_jax.load(tiny, dtype="float32", max_tokens=64, max_seqs=3, progress=True)
    engine.generate(PROMPTS[:2], max_tokens=3)
    shown = capsys.readouterr().err
    assert "generate" in shown
    assert "input" in shown and "output" in shown and "tokens/s" in shown
