"""Turns tokens into text one at a time, never showing half a character.

Knows no tokenizer file, only what one can do (`Detokenizer`), and no stop strings.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

_REPLACEMENT = "\ufffd"
# UTF-8 characters have at most four bytes, and a token has at least one.
_UNFINISHED = 3


@runtime_checkable
class Detokenizer(Protocol):
    """What the decoder needs of a tokenizer (moe_jax.checkpoint.tokenizer.Tokenizer has it)."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens; U+FFFD for bytes that form no character."""
        ...

    def has_text(self, token: int) -> bool:
        """Whether `decode` looks at this token at all (it skips special ones)."""
        ...


class StreamDecoder:
    """The text of a growing list of tokens, piece by piece.

    The pieces join to `tokenizer.decode(all tokens)`: for well-formed text with every tokenizer,
    for any bytes at all with byte-level ones. (Decoders with byte fallback replace a whole run of
    byte tokens if one is wrong, even what was shown before; here only the wrong ones become
    U+FFFD.) A token costs a few decodings of the last few tokens, however long the text is.

        context        pending
        t1 t2 t3       t4 t5        decode(t1..t5) = decode(t1 t2 t3) + new text
        shown          not shown    (the context decides about leading spaces)
    """

    def __init__(self, tokenizer: Detokenizer, context: Sequence[int] = ()):
        """Starts a text; `context`: tokens before it, if its first space shall be kept."""
        self._tokenizer = tokenizer
        self._context = [token for token in context if tokenizer.has_text(token)]
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Takes one token and returns the text that is now certain; it may be empty."""
        if not self._tokenizer.has_text(token):
            return ""
        self._pending.append(token)
        text = self._new_text()
        if text and not text.endswith(_REPLACEMENT):
            return self._show(len(self._pending), text)
        return self._settle() if len(self._pending) > _UNFINISHED else ""

    def flush(self) -> str:
        """Ends the text and returns what was held back."""
        text = self._new_text()
        if text is None:
            text = self._tokenizer.decode(self._pending)
        return self._show(len(self._pending), text)

    def _new_text(self) -> str | None:
        """What pending tokens add to the context; None if they change the text shown before."""
        shown = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._pending)
        return text[len(shown) :] if text.startswith(shown) else None

    def _show(self, count: int, text: str) -> str:
        """Moves the first `count` pending tokens, whose text is `text`, to the context."""
        if text:
            self._context = self._pending[:count]
        self._pending = self._pending[count:]
        return text

    def _settle(self) -> str:
        """Shows the oldest pending tokens if they are no part of an unfinished character.

        More tokens wait than a character has bytes, so some bytes among them are wrong, or were
        in a context that makes a decoder with byte fallback replace everything.
        """
        decode = self._tokenizer.decode
        text = decode(self._pending)
        if not text.endswith(_REPLACEMENT):
            return self._show(len(self._pending), text)
        for count in range(1, len(self._pending)):
            # A cut inside a character makes more U+FFFD than the uncut text has.
            head = decode(self._pending[:count])
            if head + decode(self._pending[count:]) == text:
                return self._show(count, head)
        return ""
