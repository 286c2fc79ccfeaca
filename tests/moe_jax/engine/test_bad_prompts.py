"""Prompts and options that cannot be run are refused before anything is computed."""

import numpy as np
import pytest

import moe_jax

CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("", "the prompt is empty; give at least one token"),
        ([], "the prompt is empty"),
        ([1, 300], r"token id 300 is outside the vocabulary of 300 tokens \(0..299\)"),
        ([-1], "token id -1 is outside"),
        (["fine", [4, 2**70]], f"token id {2**70} is outside"),
        ([5] * 65, "65 tokens, longer than max_tokens=64 of the KV cache; shorten it or load"),
        ([1.5], "a prompt is text, a list of token ids, or a list of chat messages"),
        ([True], r"got list: \[True\]"),
        (7, "got int: 7"),
        (None, "got NoneType: None"),
        ([None], r"got list: \[None\]"),
        (b"bytes", "got bytes: b'bytes'"),
        ({"role": "user", "content": "hi"}, "a prompt is text"),
        ([[[1]]], r"got list: \[\[1\]\]"),
        ([{"role": "user"}], "message 0 has no 'content'"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_prompts(engine, prompt, text):
    before = engine.stats
    with pytest.raises(ValueError, match=text):
        engine.generate(prompt)
    assert engine.stats == before


@pytest.mark.parametrize(
    "options, text",
    [
        ({"temprature": 1}, "unknown option 'temprature'; did you mean 'temperature'?"),
        ({"temperature": float("nan")}, r"temperature must be a number from 0 \(greedy\).*got nan"),
        ({"temperature": -0.5}, r"temperature must be a number from 0 \(greedy\).*got -0.5"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be a number above 0"),
        ({"stop": [""]}, "stop string 0 is empty"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_options(engine, method, options, text):
    with pytest.raises(ValueError, match=text):
        getattr(engine, method)("one", **options)


@pytest.mark.parametrize("prompts", [["a", "b"], [CHAT], np.ones((2, 2), int)], ids=repr)
def test_stream_takes_one_prompt(engine, prompts):
    with pytest.raises(ValueError, match="this takes one prompt, and was given a list"):
        engine.stream(prompts)


@pytest.mark.parametrize(
    "without, prompt, options, text",
    [
        (["tokenizer.json"], "one", {}, "has no tokenizer.json; copy it"),
        (["tokenizer.json"], CHAT, {}, "has no tokenizer.json; copy it"),
        (["tokenizer.json"], [1], {"stop": "x"}, "stop strings need a tokenizer: .*copy has no"),
        (["chat_template.jinja"], CHAT, {}, "chat template"),
    ],
    ids=["text", "chat", "stop", "no_template"],
)
def test_folders_without_tokenizer_or_template(copy, without, prompt, options, text):
    bare = moe_jax.load(copy(*without), dtype="float32", max_tokens=16, max_seqs=1)
    with pytest.raises(ValueError, match=text):
        bare.generate(prompt, **options)


def test_token_ids_need_no_tokenizer(engine, monkeypatch):
    expected = engine.generate([5, 6], max_tokens=3, ignore_eos=True)
    monkeypatch.setattr(engine, "tokenizer", None)
    completion = engine.generate([5, 6], max_tokens=3, ignore_eos=True)
    assert completion.tokens == expected.tokens
    assert completion.text == ""
