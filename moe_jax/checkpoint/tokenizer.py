"""Text to token ids and back, from a checkpoint's tokenizer.json.

Knows no model: whether an id fits the model's vocabulary is the engine's question.
"""

import os
import pathlib
from collections.abc import Sequence

import tokenizers

from moe_jax.checkpoint.json_file import read_json_object

Folder = str | os.PathLike[str]


class Tokenizer:
    """A tokenizer.json, used through the `tokenizers` library."""

    def __init__(self, path: Folder):
        """Reads the tokenizer.json at `path`; ValueError where it is missing or broken."""
        path = pathlib.Path(path)
        if not path.is_file():
            raise ValueError(missing_tokenizer(path.parent))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every mistake in a file
            raise ValueError(
                f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} can read "
                f"({error}); fetch the file again, or upgrade tokenizers"
            ) from error
        # Files saved after training may cut or pad what they encode, which would change prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, content in added.items() if content.special)
        self._vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` can return."""
        return self._vocab_size

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the file itself adds around it.

        Raises ValueError for a text that is no valid Unicode (a lone surrogate).
        """
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, text: str) -> list[int]:
        """The ids of a rendered chat: as `encode`, but the template wrote its special tokens."""
        return self._encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these ids; special tokens and ids outside the vocabulary give nothing.

        Bytes that form no character become U+FFFD.
        """
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def has_text(self, token: int) -> bool:
        """Whether `decode` looks at this id at all."""
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has a lone surrogate ({text[error.start]!r}) at character "
                f"{error.start}; remove it, or decode the text's bytes with errors='replace'"
            ) from error
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def read_tokenizer(folder: Folder) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder; None if it has no tokenizer.json.

    A model without one still runs on token ids. A file that cannot be read is a ValueError.
    """
    path = pathlib.Path(folder) / "tokenizer.json"
    return Tokenizer(path) if path.exists() else None


def missing_tokenizer(folder: Folder) -> str:
    """What to tell a user who needs the tokenizer of a folder that has none."""
    folder = pathlib.Path(folder)
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder} has only a sentencepiece tokenizer.model, which is not read here; convert "
            "it with transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder), "
            "which writes tokenizer.json, or give token ids instead of text"
        )
    return (
        f"{folder} has no tokenizer.json; copy it from the model's original folder, "
        "or give token ids instead of text"
    )


def stop_tokens(folder: Folder) -> frozenset[int]:
    """The ids that end a text: eos_token_id of generation_config.json, else of config.json.

    Empty if neither file names one. Raises ValueError for anything but an id or a list of ids.
    """
    for name in ("generation_config.json", "config.json"):
        path = pathlib.Path(folder) / name
        value = read_json_object(path).get("eos_token_id") if path.exists() else None
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ValueError(
                f"{path}: eos_token_id must be a token id or a list of token ids, got {value!r}"
            )
        return frozenset(ids)
    return frozenset()
