"""What the server needs of an engine, and nothing more: `moe_jax.Engine` has it."""

from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, Protocol, runtime_checkable

from moe_jax.engine.loop import Load
from moe_jax.engine.outputs import Completion, Piece


@runtime_checkable
class TokenText(Protocol):
    """A tokenizer's way back."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens."""


@runtime_checkable
class ServedEngine(Protocol):
    """An engine that many can use at once."""

    @property
    def tokenizer(self) -> TokenText | None:
        """None if the model works on token ids only."""

    @property
    def load_now(self) -> Load:
        """How busy it is."""

    def astream(self, prompt: Any, **options: Any) -> AsyncGenerator[Piece, None]:
        """Continues a prompt; closing the generator cancels it. ValueError for bad input."""

    def agenerate(
        self, prompt: Any, **options: Any
    ) -> Coroutine[Any, Any, Completion | list[Completion]]:
        """Continues a prompt to its end; a list for num_return above 1, the best first."""
