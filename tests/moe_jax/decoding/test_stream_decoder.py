import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from moe_jax.checkpoint.tokenizer import Tokenizer
from moe_jax.decoding.stream_decoder import StreamDecoder

CORPUS = [
    "the quick brown fox jumps over the lazy dog, again and again",
    "größer, naïve café, Ελληνικά, русский текст, 日本語の文章 と 中文",
    "family 👩‍👩‍👧 flags 🇩🇪 skin 👍🏽 e\u0301 combining",
]
SETTINGS = hypothesis.settings(derandomize=True, deadline=None, max_examples=80)
ALPHABET = st.characters(exclude_categories=["Cs"]) | st.sampled_from(
    "👩‍👧😀語中é\u0301\u200d ab\n\ufffd"
)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    """Byte-level BPE with merges inside and across characters, and one special token (id 0)."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    tokenizer.save(str(path))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory) -> Tokenizer:
    """As sentencepiece models are converted: letters, "▁" for spaces, bytes for all else."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz", "▁a", "▁t", "th", "▁th", "語"]
    merges = [("▁", "a"), ("▁", "t"), ("t", "h"), ("▁t", "h")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    path = tmp_path_factory.mktemp("byte_fallback") / "tokenizer.json"
    tokenizer.save(str(path))
    return Tokenizer(path)


def pieces_of(tokenizer, tokens) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*map(decoder.push, tokens), decoder.flush()]


@SETTINGS
@hypothesis.given(text=st.text(ALPHABET, max_size=40))
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_pieces_join_to_the_text(request, kind, text):
    tokenizer = request.getfixturevalue(kind)
    tokens = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert pieces[-1] == ""


@SETTINGS
@hypothesis.given(tokens=st.lists(st.integers(0, 420), max_size=60))
def test_any_bytes_join_with_a_byte_level_tokenizer(byte_level, tokens):
    assert "".join(pieces_of(byte_level, tokens)) == byte_level.decode(tokens)


@SETTINGS
@hypothesis.given(data=st.lists(st.integers(0x80, 0xFF), max_size=60))
def test_single_bytes_join_with_a_byte_level_tokenizer(byte_level, data):
    by_byte = {byte_level._tokenizer.id_to_token(i): i for i in range(1, 257)}
    letters = bytes_to_letters()
    tokens = [by_byte[letters[byte]] for byte in data]
    pieces = pieces_of(byte_level, tokens)
    assert "".join(pieces) == bytes(data).decode(errors="replace")
    assert len(pieces[-1]) <= 3


def bytes_to_letters() -> dict[int, str]:
    """The letter that stands for each byte: printable ones for themselves, others from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x80a", "\ufffda"),
        (b"\x80\x80\x80\x80\x80", "\ufffd" * 5),
        (b"a\xf0\x9f\x98", "a" + "\ufffd" * 3),
        (b"\x80\xf0\x9f\x98\x80", "\ufffd😀"),
        # tokenizers would replace the valid neighbour too, although it was already shown
        (b"\xf0\x9f\x98\x80\x80", "😀\ufffd"),
        (b"\xf0\x9f\x98\x80\x80a", "😀\ufffda"),
    ],
)
def test_wrong_bytes_with_byte_fallback(byte_fallback, data, expected):
    tokens = [
        1 + byte if byte >= 0x80 else byte_fallback.encode("b" + chr(byte))[-1] for byte in data
    ]
    assert "".join(pieces_of(byte_fallback, tokens)) == expected


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_endless_wrong_bytes_come_out_at_constant_cost(request, kind):
    tokenizer = Counting(request.getfixturevalue(kind))
    wrong = next(t for t in range(1, 300) if tokenizer.decode([t, t]) == "\ufffd\ufffd")
    decoder = StreamDecoder(tokenizer)
    shown = "".join(decoder.push(wrong) for _ in range(200))
    assert len(shown) >= 197
    assert tokenizer.longest <= 8
    assert shown + decoder.flush() == "\ufffd" * 200


def test_long_texts_are_decoded_in_short_windows(byte_level):
    tokenizer = Counting(byte_level)
    tokens = byte_level.encode("the lazy 日本語 dog 😀 " * 50)
    assert "".join(pieces_of(tokenizer, tokens)) == byte_level.decode(tokens)
    assert tokenizer.longest <= 10
    assert tokenizer.calls <= 3 * len(tokens)


class Counting:
    """A tokenizer that remembers how much it had to decode."""

    def __init__(self, tokenizer):
        self.inner, self.calls, self.longest = tokenizer, 0, 0

    def decode(self, tokens):
        self.calls, self.longest = self.calls + 1, max(self.longest, len(tokens))
        return self.inner.decode(tokens)

    def has_text(self, token):
        return self.inner.has_text(token)


def test_half_a_character_waits_and_special_tokens_are_invisible(byte_level):
    decoder = StreamDecoder(byte_level)
    first, *rest = byte_level.encode("😎")
    assert rest, "the emoji must be several tokens"
    assert decoder.push(first) == ""
    assert decoder.push(0) == ""
    assert [decoder.push(token) for token in rest][-1] == "😎"
    assert decoder.flush() == ""


def test_a_context_keeps_the_first_space(byte_fallback):
    before, after = byte_fallback.encode("a"), byte_fallback.encode("the")
    assert "".join(pieces_of(byte_fallback, after)) == "the"
    decoder = StreamDecoder(byte_fallback, context=before)
    assert "".join(map(decoder.push, after)) == " the"
