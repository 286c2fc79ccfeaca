"""Turns what a user passes as a prompt into token ids, and refuses what cannot be run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.checkpoint.chat import ChatTemplate, missing_chat_template
from moe_jax.checkpoint.tokenizer import Tokenizer, missing_tokenizer

ChatMessage = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[ChatMessage]


def is_many(prompts: Any) -> bool:
    """Whether this is a list of prompts and not one prompt."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence | np.ndarray):
        return False
    if isinstance(prompts, np.ndarray):
        return prompts.ndim > 1
    return len(prompts) > 0 and isinstance(prompts[0], str | Sequence | np.ndarray)


def encode_prompt(
    prompt: Any,
    *,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    folder: Path,
    vocab: int,
    capacity: int,
) -> tuple[int, ...]:
    """Returns the token ids of a text, a list of ids or a list of chat messages.

    Raises ValueError for an empty prompt, ids outside the vocabulary, a prompt longer than the KV
    cache, text without a tokenizer, chat without a template, and anything that is none of these.
    """
    tokens = _tokens_of(prompt, tokenizer, template, folder)
    if not tokens:
        raise ValueError("the prompt is empty; give at least one token")
    wrong = [token for token in tokens if not 0 <= token < vocab]
    if wrong:
        raise ValueError(
            f"token id {wrong[0]} is outside the vocabulary of {vocab} tokens (0..{vocab - 1})"
        )
    if len(tokens) > capacity:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens, longer than max_tokens={capacity} of the KV "
            f"cache; shorten it or load the model with a larger max_tokens="
        )
    return tuple(tokens)


def _tokens_of(
    prompt: Any, tokenizer: Tokenizer | None, template: ChatTemplate | None, folder: Path
) -> list[int]:
    if hasattr(prompt, "__array__"):
        prompt = np.asarray(prompt).tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise ValueError(_not_a_prompt(prompt))
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(missing_tokenizer(folder))
        return tokenizer.encode(prompt)
    if prompt and all(isinstance(item, Mapping) for item in prompt):
        if template is None:
            raise ValueError(missing_chat_template(folder))
        if tokenizer is None:
            raise ValueError(missing_tokenizer(folder))
        return tokenizer.encode_chat(template.render(prompt))
    integer = lambda item: isinstance(item, int | np.integer) and not isinstance(item, bool)
    if not all(integer(item) for item in prompt):
        raise ValueError(_not_a_prompt(prompt))
    return [int(item) for item in prompt]


def _not_a_prompt(prompt: Any) -> str:
    return (
        f"a prompt is text, a list of token ids, or a list of chat messages "
        f"({{'role': ..., 'content': ...}}); got {type(prompt).__name__}: {prompt!r:.80}"
    )
