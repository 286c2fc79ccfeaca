"""Log-probabilities of tokens, in the two forms that OpenAI's clients know.

Knows pieces and token text, not requests.
"""

from collections.abc import Sequence
from typing import Any

from moe_jax.engine.outputs import Piece
from moe_jax.server.face import TokenText

_LEAST = -9999.0  # JSON has no minus infinity; OpenAI's own servers write this


def token_text(tokenizer: TokenText | None, token: int) -> str:
    """The text of one token; "token_id:7" where a model has no tokenizer."""
    if tokenizer is None:
        return f"token_id:{token}"
    alone = tokenizer.decode([token])
    # Some tokenizers drop the space before the first word of a text, but not before the second.
    twice = tokenizer.decode([token, token])
    return alone if "\ufffd" in twice else twice.removeprefix(alone)


def chat_logprobs(tokenizer: TokenText | None, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The field `logprobs` of a choice of /v1/chat/completions."""
    content = [
        _chat_entry(tokenizer, _token(piece), piece.logprob)
        | {"top_logprobs": [_chat_entry(tokenizer, *pair) for pair in piece.top_logprobs]}
        for piece in pieces
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: TokenText | None, pieces: Sequence[Piece], offset: int
) -> dict[str, Any]:
    """The field `logprobs` of a choice of /v1/completions.

    Args:
      tokenizer: gives the text of tokens.
      pieces: of one sequence, in order.
      offset: characters of the sequence before these pieces.
    """
    tokens, offsets, tops = [], [], []
    for piece in pieces:
        tokens.append(token_text(tokenizer, _token(piece)))
        offsets.append(offset)
        offset += len(piece.text)
        # The chosen token is listed too, also where it is not among the likeliest.
        pairs = [*piece.top_logprobs, (_token(piece), piece.logprob)]
        tops.append({token_text(tokenizer, token): max(value, _LEAST) for token, value in pairs})
    return {
        "tokens": tokens,
        "token_logprobs": [max(piece.logprob, _LEAST) for piece in pieces],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _token(piece: Piece) -> int:
    assert piece.token is not None, "only sampled sequences have log-probabilities"
    return piece.token


def _chat_entry(tokenizer: TokenText | None, token: int, logprob: float) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    # A part of a character has no text of its own, and a tokenizer does not tell its bytes.
    whole = tokenizer is not None and "\ufffd" not in text
    return {
        "token": text,
        "logprob": max(logprob, _LEAST),
        "bytes": list(text.encode()) if whole else None,
    }
