import itertools
import re

import numpy as np
import pytest

from moe_jax.evaluate import data

FILLER = np.arange(1000, 1400)
encode = lambda text: list(text.encode())


def text_of(tokens):
    return bytes(token for token in tokens if token < 256).decode()


def draw(kind, split="test", seed=0, questions=1):
    generator = np.random.default_rng(seed)
    if kind == "passkey":
        return data.passkey(encode, FILLER, [0.25], [1.0], split, generator)
    if kind == "recall":
        return data.recall(encode, 12, questions, split, generator)
    if kind == "cross_chunk":
        filler = [FILLER[:5], FILLER[5:5], FILLER[9:20]]
        return data.cross_chunk(encode, 3, 4, filler, split, generator)
    return data.copying(encode, 6, split, generator)


KINDS = ("passkey", "recall", "cross_chunk", "copying")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_and_another_another(kind):
    assert draw(kind) == draw(kind)
    assert draw(kind) != draw(kind, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_share_no_name_and_no_number(kind):
    found = {}
    for split in ("train", "test"):
        texts = [text_of(data.as_question(draw(kind, split, seed)).answer) for seed in range(60)]
        found[split] = {word for text in texts for word in text.split()}
    assert len(found["test"]) > 30
    assert not found["train"] & found["test"]
    assert all(data.is_for_tests(word) for word in found["test"])
    assert not any(data.is_for_tests(word) for word in found["train"])


@pytest.mark.parametrize("seed", range(5))
def test_a_pass_key_is_hidden_at_its_depth_and_asked_at_the_end(seed):
    question = data.as_question(draw("passkey", seed=seed))
    text = text_of(question.prompt)
    ((name, key),) = re.findall(r"The pass key of (\w+) is (\d{5})\.", text)
    assert text.endswith(f"\n# The pass key of {name} is")
    assert text_of(question.answer) == f" {key}"
    needle = question.prompt.index(encode("\n")[0])
    assert needle == 100  # a quarter of the filler
    assert [token for token in question.prompt if token >= 1000] == FILLER.tolist()


def test_keys_may_be_many_each_asked_after_it_was_said():
    hidden, asked = [0.1, 0.5, 0.5], [0.9, 0.5, 0.7]
    generator = np.random.default_rng(0)
    pieces = data.passkey(encode, FILLER, hidden, asked, "train", generator)
    text = text_of([token for piece in pieces for token in piece.tokens])
    for piece in (answers := [piece for piece in pieces if piece.answer]):
        key = text_of(piece.tokens).strip()
        assert text.count(key) == 2 and text.index(f"is {key}.\n") < text.rindex(f"is {key}")
    assert len(answers) == 3


@pytest.mark.parametrize("seed", range(5))
def test_what_is_asked_of_a_table_stands_in_it(seed):
    question = data.as_question(draw("recall", seed=seed))
    text = text_of(question.prompt)
    ports = dict(re.findall(r"# port of (\w+) is (\d{4})\n", text))
    assert len(ports) == 12
    (asked,) = re.findall(r"# port of (\w+) is$", text)
    assert text_of(question.answer) == f" {ports[asked]}"


@pytest.mark.parametrize("seed", range(5))
def test_the_answer_across_chunks_is_the_one_name_that_two_chunks_hold(seed):
    question = data.as_question(draw("cross_chunk", seed=seed), (2000,), 3)
    bounds = (*question.chunks, question.end)
    chunks = [question.prompt[a:b] for a, b in itertools.pairwise(bounds)]
    assert question.prompt[0] == 2000 and sum(map(len, chunks)) == question.end
    teams = [text_of(chunk).strip().split(": ")[1].split() for chunk in chunks]
    assert [len(team) for team in teams] == [4, 4, 4]
    names = [name for team in teams for name in team]
    (twice,) = {name for name in names if names.count(name) == 2}
    assert len(set(names)) == 11 and sum(twice in team for team in teams) == 2
    assert text_of(question.answer) == f" {twice}"
    assert text_of(question.prompt[question.end :]) == "\n# In two teams:"
    # No name begins like another: half a name is enough to tell.
    assert len({name[:3] for name in names}) == 11


def test_a_copy_repeats_the_list():
    question = data.as_question(draw("copying"))
    line = text_of(question.prompt).split("list:")[1].split("\n")[0]
    assert text_of(question.answer) == line and len(line.split()) == 6


def test_an_answer_is_what_its_tokens_are_after_the_question():
    # As tokenizers do that put a space before every text: alone, " 12" would begin with two.
    spaced = lambda text: list(f" {text}".encode())
    pieces = data.recall(spaced, 3, 1, "test", np.random.default_rng(0))
    question = data.as_question(pieces)
    assert re.fullmatch(r" \d{4}", text_of(question.answer))


def test_a_tokenizer_that_joins_question_and_answer_is_refused():
    def joining(text):
        return [len(word) for word in text.split(":")]

    with pytest.raises(ValueError, match=r"joins .* cannot be asked for"):
        data.copying(joining, 3, "test", np.random.default_rng(0))


GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.passkey(encode, FILLER, [-0.1], [1.0], "test", GENERATOR), "depth -0.1"),
        (lambda: data.passkey(encode, FILLER, [0.5], [0.4], "test", GENERATOR), "asked at 0.4"),
        (lambda: data.passkey(encode, FILLER, [0.5], [1.5], "test", GENERATOR), "asked at 1.5"),
        (lambda: data.recall(encode, 3, 4, "test", GENERATOR), "4 questions .* about 3 pairs"),
        (lambda: data.recall(encode, 500, 1, "test", GENERATOR), "500 different names"),
        (lambda: data.cross_chunk(encode, 9, 2, [], "test", GENERATOR), "9 chunks with 2 names"),
        (lambda: data.cross_chunk(encode, 8, 7, [], "test", GENERATOR), "55 different names"),
    ],
)
def test_what_cannot_be_made_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
