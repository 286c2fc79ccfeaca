import pytest
from tokenizers import Tokenizer, models

from moe_jax.training.tokenizer import END_OF_TEXT, end_of_text_id, train_tokenizer


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x\n", "π ≈ 3.14159\r\n\t\t# ταυ", "  \n\n   x", "a" * 99]
)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert max(ids) < tokenizer.get_vocab_size()
    assert tokenizer.decode(ids) == text


def test_the_first_entry_ends_a_text(tokenizer):
    assert end_of_text_id(tokenizer) == 0
    assert tokenizer.encode(END_OF_TEXT).ids == [0]


def test_digits_stand_alone_and_indentation_is_one_token(tokenizer):
    assert len(tokenizer.encode("1234").ids) == 4
    assert len(tokenizer.encode("\n    ").ids) == 1


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="the texts give a vocabulary of 257, not 300; use more"):
        train_tokenizer(["x"], 300)


def test_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"the tokenizer has no token <\|endoftext\|>; make it"):
        end_of_text_id(Tokenizer(models.BPE()))
