import math
import sys
from unittest import mock

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.engine.load import reference_model_folder
from moe_jax.engine.sizing import device_memory_for
from moe_jax.evaluate.accuracy import Accuracy
from moe_jax.evaluate.compare import Bar, Comparison, compare
from moe_jax.evaluate.questions import Answers, grade, make_questions
from tests.moe_jax.evaluate.conftest import OPTIONS


@pytest.fixture(scope="module")
def texts(text):
    return [text[:1200], text[2000:2700]]


def zero_an_expert(name, tensor):
    return tensor * 0 if ".layers.3.mlp.experts.5." in name else tensor


def shuffle_a_router(name, tensor):
    return tensor[::-1] if name == "model.layers.2.mlp.gate.weight" else tensor


DAMAGES = {
    "one expert zeroed": {"change": zero_an_expert},
    "router shuffled": {"change": shuffle_a_router},
    "RoPE base off by 10 %": {"rope_theta": 11000.0},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_is_caught(engine, texts, damaged, damage):
    changed = moe_jax.load(damaged(**damage), **OPTIONS)
    comparison = compare(engine, changed, texts, (), progress=False)
    assert not comparison.holds, comparison


def test_a_kv_page_swapped_with_that_of_another_text_is_caught(engine, text, texts):
    changed = moe_jax.load(**OPTIONS)
    changed.logits(text[5000:])  # fills pages that the texts do not use
    runner = changed._loop.runner
    run = runner._run

    def run_and_swap(batch, *more):
        result = run(batch, *more)
        if not batch[0].cached:  # the first chunk of a text: it has filled 32 pages
            here = batch[0].pages[3]
            (others,) = np.nonzero(np.asarray(runner._kv[0].keys).any(axis=(1, 2, 3)))
            there = np.setdiff1d(others, batch[0].pages)[0]
            swap = lambda pages: pages.at[here].set(pages[there]).at[there].set(pages[here])
            runner._kv = jax.tree.map(swap, runner._kv)
        return result

    with mock.patch.object(runner, "_run", run_and_swap):
        comparison = compare(engine, changed, texts, (), progress=False)
    assert not comparison.holds, comparison


def test_where_experts_run_changes_nothing(engine, text):
    options = {key: OPTIONS[key] for key in ("dtype", "max_tokens", "max_seqs")}
    budget = device_memory_for(reference_model_folder(), experts=0.4, **options)
    changed = moe_jax.load(device_memory=budget, **OPTIONS)
    questions = make_questions("recall", engine, text, 3)
    comparison = compare(engine, changed, [text[:300]], [questions], progress=False)
    assert comparison.holds and comparison.kl == 0 and comparison.agreement == 1
    assert comparison.points("recall") == 0 and "the bar holds" in str(comparison)


def test_bfloat16_passes(engine, texts):
    comparison = compare(
        engine, moe_jax.load(**OPTIONS | {"dtype": "bfloat16"}), texts, (), progress=False
    )
    assert comparison.holds and comparison.kl > 0, comparison


def made(kl=0.0, agreement=1.0, right=9, bar=None):
    before, after = (
        Answers("recall", {"": Accuracy(count, 10)}, tuple(i < count for i in range(10)))
        for count in (9, right)
    )
    tasks = {"recall": (before, after)}
    return Comparison(kl, kl, agreement, 100, tasks, bar or Bar())


@pytest.mark.parametrize(
    ("comparison", "failure"),
    [
        (made(kl=0.02), "KL 0.02 nats per token, at most 0.001 allowed"),
        (made(kl=math.nan), "KL nan"),
        (made(agreement=0.9), "the same likeliest token for 90.0%, at least 98.0% asked"),
        (made(right=8), "recall -10.0 points, at most 2 may be lost"),
    ],
)
def test_what_fails_is_said(comparison, failure):
    (said,) = comparison.failures
    assert failure in said and not comparison.holds and f"FAILS: {said}" in str(comparison)


def test_the_bar_is_the_users():
    assert made(kl=0.02, agreement=0.9, right=8, bar=Bar(0.03, 0.8, 15.0)).holds
    assert made(right=10).points("recall") == pytest.approx(10) and made(right=10).holds


def test_damage_that_only_decoding_meets_is_caught(engine, text):
    changed = moe_jax.load(**OPTIONS)
    runner = changed._loop.runner
    run = runner._run

    def run_wrongly(batch, tokens, *more):
        result = run(batch, tokens, *more)
        return -result if tokens == 1 else result

    with mock.patch.object(runner, "_run", run_wrongly):
        found = compare(engine, changed, [text[:200]], (), progress=False)
        unseen = compare(engine, changed, [text[:200]], (), decoded=0, progress=False)
    assert not found.holds and found.tokens == 199
    assert unseen.holds and unseen.kl == 0


def test_a_text_longer_than_the_cache_is_read_in_windows(engine, text):
    small = moe_jax.load(**OPTIONS | {"max_tokens": 128})
    found = compare(engine, small, [text[:300]], (), context=100, progress=False)
    assert found.holds and found.tokens == 299


def test_without_texts_and_questions_it_takes_its_own(engine, monkeypatch):
    """Without reading and answering them, which takes long."""

    def unread(engines, texts, *_):
        assert max(len(one) for one in texts) == 512
        tokens = sum(len(one) - 1 for one in texts)
        return np.zeros(tokens), np.ones(tokens, bool)

    right = lambda _, asked: grade(asked, [True] * len(asked.questions))
    module = sys.modules[compare.__module__]
    monkeypatch.setattr(module, "_differences", unread)
    monkeypatch.setattr(module, "answer", right)
    found = compare(engine, engine, progress=False)
    assert found.tokens > 5000 and set(found.tasks) == {"recall", "cross_chunk"}
    assert all(before.total.total == 100 for before, _ in found.tasks.values())


def test_what_cannot_be_compared_is_refused(engine, text, tiny):
    with pytest.raises(ValueError, match="vocabularies of 4096 and 300 tokens"):
        compare(engine, moe_jax.load(tiny, progress=False), [[1, 2]])
    with pytest.raises(ValueError, match="no text has two tokens"):
        compare(engine, engine, [], ())
    twice = [make_questions("recall", engine, text, 1, seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match="a task is asked twice in"):
        compare(engine, engine, [text[:9]], twice)
    with pytest.raises(ValueError, match="context=1, decoded=16"):
        compare(engine, engine, [text[:9]], (), context=1)
    small = moe_jax.load(**OPTIONS | {"max_tokens": 64})
    with pytest.raises(ValueError, match="the engine has max_tokens=64"):
        compare(engine, small, [text[:9]], twice[:1])
