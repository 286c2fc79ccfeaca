"""Rotary frequencies that follow the length: keys computed again would differ; they never are."""

import pytest

import moe_jax
from moe_jax.model.compiled import LayerProgram

ROPE = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}
LONG = {"max_tokens": 30, "ignore_eos": True}


@pytest.fixture
def growing(copy):
    """The tiny model with frequencies that change after 32 tokens, and six pages."""
    folder = copy(config={"rope_scaling": ROPE, "max_position_embeddings": 32})
    return moe_jax.load(folder, dtype="float32", max_tokens=80, max_seqs=2, progress=False)


def test_a_long_text_shares_nothing_and_keeps_its_pages(growing, monkeypatch):
    prompt = list(range(1, 18))
    short = growing.generate(prompt, max_tokens=4, ignore_eos=True)
    assert growing.generate(prompt, max_tokens=4, ignore_eos=True).cached_tokens == 16
    long = growing.generate(prompt, **LONG)
    assert long.cached_tokens == 0
    assert long.tokens[:4] == short.tokens

    handle = growing.submit(prompt, **LONG)
    for _ in range(20):
        growing._loop.step()
    with pytest.raises(RuntimeError, match=r"5 KV pages are needed, 3 are free, .* let them end"):
        growing.logits(list(range(1, 81)))
    assert handle.result().tokens == long.tokens

    handle = growing.submit(prompt, **LONG)
    growing._loop.step()
    with monkeypatch.context() as patch:
        patch.setattr(LayerProgram, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            growing._loop.step()
    with pytest.raises(RuntimeError, match="an interrupt took the keys and values of this request"):
        handle.result()
    assert growing._loop.violations() == []
    assert growing.generate(prompt, **LONG).tokens == long.tokens


def interrupt(self, *arguments):
    raise KeyboardInterrupt
