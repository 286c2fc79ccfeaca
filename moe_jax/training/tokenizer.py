"""Makes a byte-level BPE tokenizer for source code.

Knows only text. Serving reads the tokenizer.json this writes (`moe_jax.checkpoint`).
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# A line end and the indentation after it are one piece, so that a token can stand for "next line,
# two levels in" and words at the start of a line need no leading space. Digits stand alone.
_PIECES = r"\s*\n\s*| ?\p{L}+| ?_+|\d| ?[^\s\p{L}\d_]+|\s+(?=\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Trains a tokenizer of exactly `vocab` entries; entry 0 is the end-of-text token.

    Raises:
      ValueError: the texts are too few to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    made = tokenizer.get_vocab_size()
    if made != vocab:
        raise ValueError(f"the texts give a vocabulary of {made}, not {vocab}; use more text")
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that separates documents.

    Raises:
      ValueError: the tokenizer was not made by `train_tokenizer`.
    """
    token = tokenizer.token_to_id(END_OF_TEXT)
    if token is None:
        raise ValueError(f"the tokenizer has no token {END_OF_TEXT}; make it with train_tokenizer")
    return token
