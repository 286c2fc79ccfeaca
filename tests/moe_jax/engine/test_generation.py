"""What generate and stream return for every option."""

from dataclasses import replace

import numpy as np
import pytest

import moe_jax

PROMPTS = ["many experts", "one mixture", "host; small one", "of them", "on the host, some"]
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 11}
OPTIONS = {
    "greedy": {},
    "sampled": SAMPLED,
    "penalised": {"repetition_penalty": 1.5},
    "stopped": {"stop": ["e", "/Z"]},
}


@pytest.fixture(scope="module", params=OPTIONS, ids=str)
def singles(request, engine):
    """Options, and what each prompt gives alone."""
    options = {"max_tokens": 10, **OPTIONS[request.param]}
    return options, [engine.generate(prompt, **options) for prompt in PROMPTS]


def same(one, other):
    exact = lambda c: (c.text, c.tokens, c.finish_reason)
    return exact(one) == exact(other) and np.allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 5], ids="{}_prompts".format)
def test_a_list_gives_what_its_prompts_give_alone(engine, singles, count):
    """Five prompts are more than there are seats (3) and KV (64 tokens)."""
    options, expected = singles
    completions = engine.generate(PROMPTS[:count], **options)
    assert isinstance(completions, list)
    assert len(completions) == count
    assert all(map(same, completions, expected))


def test_one_prompt_gives_one_completion(singles):
    completion = singles[1][0]
    assert isinstance(completion, moe_jax.Completion)
    assert len(completion.tokens) == len(completion.logprobs) <= 10


def test_pieces_of_a_stream_join_to_the_text(engine, singles):
    options, expected = singles
    for prompt, whole in zip(PROMPTS, expected, strict=True):
        pieces = list(engine.stream(prompt, **options))
        assert "".join(piece.text for piece in pieces) == whole.text
        assert tuple(piece.token for piece in pieces) == whole.tokens
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == whole.finish_reason


def test_long_requests_share_the_kv_by_turns(engine):
    """Each needs 40 of the 64 tokens, so no two of them fit."""
    prompts = [[7 + i] * 20 for i in range(3)]
    options = {"max_tokens": 21, "ignore_eos": True}
    expected = [engine.generate(prompt, **options) for prompt in prompts]
    assert all(map(same, engine.generate(prompts, **options), expected))


@pytest.mark.parametrize(
    "prompt, wanted, given",
    [([5, 6], 1, 1), ([5, 6], 7, 7), ([5] * 60, 50, 5), ([5] * 64, 50, 1)],
    ids=["one", "seven", "kv_ends", "prompt_fills_kv"],
)
def test_length_ends_a_text(engine, prompt, wanted, given):
    completion = engine.generate(prompt, max_tokens=wanted, ignore_eos=True)
    assert len(completion.tokens) == given
    assert completion.finish_reason == "length"


def test_prompts_of_every_kind(engine):
    ids = engine.tokenizer.encode(PROMPTS[0])
    expected = engine.generate(PROMPTS[0], max_tokens=4)
    for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint16)):
        assert engine.generate(prompt, max_tokens=4).tokens == expected.tokens
    for prompts in ([PROMPTS[0], ids], np.array([ids, ids]), (ids, np.array(ids))):
        assert [c.tokens for c in engine.generate(prompts, max_tokens=4)] == [expected.tokens] * 2


def test_a_chat_is_rendered_through_the_template(engine):
    chat = [{"role": "user", "content": "one"}]
    expected = engine.generate("user: one\nassistant:", max_tokens=6)
    assert engine.generate(chat, max_tokens=6).tokens == expected.tokens
    chats = engine.generate([chat, chat], max_tokens=6)
    assert [completion.tokens for completion in chats] == [expected.tokens] * 2


def log_probabilities(logits, tokens):
    wide = logits.astype(np.float64)
    return wide[range(len(tokens)), tokens] - np.log(np.exp(wide).sum(-1))


def test_greedy_tokens_and_logprobs_are_those_of_the_logits(engine):
    prompt = engine.tokenizer.encode(PROMPTS[0])
    completion = engine.generate(prompt, max_tokens=8, ignore_eos=True)
    logits = engine.logits([*prompt, *completion.tokens[:-1]])[len(prompt) - 1 :]
    assert logits.argmax(-1).tolist() == list(completion.tokens)
    expected = log_probabilities(logits, completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)


def test_sampled_logprobs_are_the_models_own(engine):
    """Neither temperature nor penalty changes what the model thinks of a token."""
    prompt = engine.tokenizer.encode(PROMPTS[1])
    options = {"temperature": 1.3, "top_k": 20, "repetition_penalty": 1.2, "ignore_eos": True}
    completion = engine.generate(prompt, max_tokens=8, **options)
    logits = engine.logits([*prompt, *completion.tokens[:-1]])[len(prompt) - 1 :]
    expected = log_probabilities(logits, completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)


def test_the_repetition_penalty_counts_prompt_and_text(engine):
    prompt = engine.tokenizer.encode(PROMPTS[0])
    completion = engine.generate(prompt, max_tokens=8, repetition_penalty=1000.0, ignore_eos=True)
    seen = list(prompt)
    for token in completion.tokens:
        logits = engine.logits(seen)[-1]
        where = np.unique(seen)
        logits[where] = np.where(logits[where] < 0, logits[where] * 1000, logits[where] / 1000)
        assert token == logits.argmax()
        seen.append(token)


def test_seeds_decide_what_is_sampled(engine):
    sample = lambda seed: (
        engine.generate(
            PROMPTS[0], max_tokens=10, temperature=1.5, seed=seed, ignore_eos=True
        ).tokens
    )
    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) == 4


def test_a_stop_string_is_found_across_tokens(engine):
    options = {"max_tokens": 24, "ignore_eos": True, "temperature": 1.0}
    pieces = list(engine.stream(PROMPTS[0], **options))
    text, end = "".join(piece.text for piece in pieces), 0
    for piece in pieces[:-1]:
        end += len(piece.text)
        stop = text[end - 1 : end + 1]
        if end > 3 and len(stop) == 2 and text.find(stop) == end - 1:
            break
    else:
        pytest.fail("no place between two tokens is unlike all before it")
    stopped = engine.generate(PROMPTS[0], stop=["not in it", stop], **options)
    assert stopped.text == text[: end - 1]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == tuple(piece.token for piece in pieces)[: len(stopped.tokens)]
    shown = [piece.text for piece in engine.stream(PROMPTS[0], stop=stop, **options)]
    assert "".join(shown) == stopped.text
    assert engine.generate(PROMPTS[0], stop="not in it", **options).text == text


def test_end_of_text_ends_the_text(engine, copy, monkeypatch):
    """Makes the model's own fourth token the end-of-text token."""
    free = engine.generate(PROMPTS[0], max_tokens=8, ignore_eos=True)
    end = free.tokens[3]
    first = free.tokens.index(end)
    folder = copy(generation_config={"eos_token_id": [299, end]})
    other = moe_jax.load(folder, dtype="float32", max_tokens=64, max_seqs=3)
    # Its programs would have to be compiled again.
    monkeypatch.setattr(other, "_loop", engine._loop)
    completion = other.generate(PROMPTS[0], max_tokens=8)
    assert completion.tokens == free.tokens[: first + 1]
    assert completion.finish_reason == "stop"
    assert completion.text == engine.tokenizer.decode(free.tokens[:first])
    assert other.generate(PROMPTS[0], max_tokens=8, ignore_eos=True).tokens == free.tokens


def test_numbers_that_are_none_are_refused(engine, monkeypatch):
    model = engine._loop.runner.model
    broken = replace(model, final_norm=model.final_norm * np.float32(np.nan))
    monkeypatch.setattr(engine._loop.runner, "model", broken)
    with pytest.raises(ValueError, match=r"NaN or infinite logits for request \d+ at position 2;"):
        engine.generate([5, 6], max_tokens=2)


def test_stats_count_tokens_and_time(engine):
    before = engine.stats
    engine.generate([[5, 6], [7, 8, 9]], max_tokens=4, ignore_eos=True)
    after = engine.stats
    assert after.prompt_tokens - before.prompt_tokens == 5
    assert after.generated_tokens - before.generated_tokens == 8
    assert after.decode_tokens - before.decode_tokens == 6
    assert after.prefill_seconds > before.prefill_seconds
    assert after.decode_seconds > before.decode_seconds
    # Two layers with experts; a step runs at least top-2 and at most all 4 of a layer.
    steps = 2 + 3
    assert 2 * 2 * steps <= after.resident - before.resident <= 2 * 4 * steps
    assert f"decode {after.decode_tokens} tokens" in str(after)
    assert f"{after.resident} resident (100%), 0 streamed, 0 on host" in str(after)
