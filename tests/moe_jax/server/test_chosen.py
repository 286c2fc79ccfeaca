"""The text of single tokens."""

import math

import pytest

from moe_jax.engine.outputs import Piece
from moe_jax.server.chosen import chat_logprobs, completion_logprobs, token_text


class Words:
    """As sentencepiece: the space before a text's first word is dropped."""

    def decode(self, tokens):
        words = {0: "\u2581one", 1: "\u2581two", 2: "s", 3: ""}
        return "".join(words[token] for token in tokens).replace("\u2581", " ").removeprefix(" ")


@pytest.mark.parametrize("token, text", [(0, " one"), (1, " two"), (2, "s"), (3, "")])
def test_a_word_keeps_its_space(token, text):
    assert token_text(Words(), token) == text


def test_without_a_tokenizer_a_token_has_a_number():
    piece = Piece(text="", token=7, logprob=-1.0, top_logprobs=((7, -1.0),))
    (entry,) = chat_logprobs(None, [piece])["content"]
    assert (entry["token"], entry["bytes"]) == ("token_id:7", None)
    assert entry["top_logprobs"] == [{"token": "token_id:7", "logprob": -1.0, "bytes": None}]


def test_minus_infinity_is_a_number_that_json_has():
    piece = Piece(text="two", token=1, logprob=-math.inf, top_logprobs=((2, -math.inf),))
    (entry,) = chat_logprobs(Words(), [piece])["content"]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999
    chosen = completion_logprobs(Words(), [piece], 5)
    assert chosen["token_logprobs"] == [-9999] and chosen["text_offset"] == [5]
    assert chosen["top_logprobs"] == [{"s": -9999, " two": -9999}]
