import json
import pathlib

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from moe_jax.checkpoint.tokenizer import (
    Tokenizer,
    missing_tokenizer,
    read_tokenizer,
    stop_tokens,
)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """One token per byte, and a post-processor that writes <s> first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def read(folder: pathlib.Path) -> Tokenizer:
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def test_encode_and_decode(folder):
    tokenizer = read(folder)
    tokens = tokenizer.encode("héllo 😀")
    assert tokens[0] == 256
    assert tokenizer.encode_chat("<s>héllo 😀") == tokens
    assert tokenizer.decode(tokens) == "héllo 😀"
    assert tokenizer.decode(tokens[:3]) == "h\ufffd"


def test_special_and_unknown_ids_have_no_text(folder):
    tokenizer = read(folder)
    assert tokenizer.vocab_size == 259
    assert [tokenizer.has_text(token) for token in (0, 256, 257, 258, 259)] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert tokenizer.decode([256, 258, 1000]) == "<think>"


def test_truncation_and_padding_in_the_file_are_ignored(folder):
    plain = read(folder).encode("a longer text")
    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(2)
    saved.enable_padding(length=64)
    saved.save(str(folder / "tokenizer.json"))
    assert read(folder).encode("a longer text") == plain


def test_lone_surrogate_is_refused(folder):
    with pytest.raises(ValueError, match=r"lone surrogate \('\\ud800'\) at character 2"):
        read(folder).encode("ab\ud800")


def test_missing_file(tmp_path):
    assert read_tokenizer(tmp_path) is None
    with pytest.raises(ValueError, match=r"no tokenizer\.json; copy it .* or give token ids"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_sentencepiece_only(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    assert read_tokenizer(tmp_path) is None
    assert "only a sentencepiece tokenizer.model" in missing_tokenizer(tmp_path)
    assert "save_pretrained(folder)" in missing_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"model": 3}']
)
def test_broken_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"tokenizer\.json is not a tokenizer that .* can read .*fetch the file again",
    ):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, set()),
        (None, {"eos_token_id": 2}, {2}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 2}, {5, 6}),
        ({"eos_token_id": 0}, {"eos_token_id": 2}, {0}),
        ({"eos_token_id": None}, {"eos_token_id": [2, 3]}, {2, 3}),
        ({}, {}, set()),
    ],
)
def test_stop_tokens(tmp_path, generation, config, expected):
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    assert stop_tokens(tmp_path) == expected


@pytest.mark.parametrize("value", ["</s>", True, -1, 2.0, [1, None], {"id": 2}])
def test_stop_tokens_of_a_wrong_type(tmp_path, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        ValueError, match=r"generation_config\.json: eos_token_id must be a token id or a list"
    ):
        stop_tokens(tmp_path)


def test_stop_tokens_of_a_broken_file(tmp_path):
    (tmp_path / "generation_config.json").write_text("nonsense")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        stop_tokens(tmp_path)
