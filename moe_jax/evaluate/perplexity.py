"""Perplexity with a stride, as it is usually given for causal language models."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from moe_jax.engine.engine import Engine
from moe_jax.engine.progress import progress_bar

Tokens = Sequence[int] | Int[np.ndarray, " _"]


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts texts.

    Attributes:
      nats: the mean of minus the log probability of each scored token.
      error: its standard error over windows.
      tokens: how many were scored.
    """

    nats: float
    error: float
    tokens: int

    @property
    def value(self) -> float:
        """exp(nats)."""
        return math.exp(self.nats)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the perplexity, windows taken as independent."""
        return math.exp(self.nats - 1.96 * self.error), math.exp(self.nats + 1.96 * self.error)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.4g} ({low:.4g} to {high:.4g}, {self.tokens} tokens)"


def perplexity(
    engine: Engine,
    texts: Sequence[Tokens],
    *,
    context: int = 1024,
    stride: int = 512,
    progress: bool = True,
) -> Perplexity:
    """The perplexity of texts, each read in windows of `context` tokens, `stride` further each.

    The first window of a text scores all its tokens but the first; a later one those that are new
    in it, each with at least context - stride others before it; so a token that starts a window is
    never scored if stride = context.

    Args:
      texts: token ids.

    Raises:
      ValueError: stride is not between 1 and context, context is below 2 or more than the engine
        holds, or no text has two tokens.
    """
    if not 1 <= stride <= context or context < 2:
        raise ValueError(
            f"windows of context={context} tokens, stride={stride} further each, leave tokens out; "
            "stride must be between 1 and context, context at least 2"
        )
    spans = [span for text in texts for span in windows(text, context, stride)]
    if not spans:
        raise ValueError("no text has two tokens, so there is nothing to predict; give more text")
    each: list[np.ndarray] = []
    with progress_bar(len(spans), "perplexity", "window", progress) as bar:
        for tokens, new in spans:
            each.append(token_nats(engine, tokens)[-new:])
            bar.update()
    nats = np.concatenate(each)
    mean = float(nats.mean())
    # Tokens of one window are not independent: a ratio estimate over windows.
    off = np.array([(one - mean).sum() for one in each])
    error = math.sqrt(float((off**2).sum())) / nats.size
    return Perplexity(mean, error, nats.size)


def token_nats(engine: Engine, tokens: Tokens) -> np.ndarray:
    """Minus the log probability of each token but the first; float64."""
    found = log_probabilities(engine.logits(tokens)[:-1])
    return -found[np.arange(len(found)), np.asarray(tokens)[1:]]


def log_probabilities(
    logits: Float[np.ndarray, "tokens vocab"],
) -> Float[np.ndarray, "tokens vocab"]:
    """The log of the softmax, in float64: differences of two models are small."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def windows(tokens: Tokens, context: int, stride: int) -> Iterator[tuple[Tokens, int]]:
    """Spans of at most `context` tokens, and how many of each span's last tokens are new."""
    scored = 1
    for start in range(0, max(len(tokens) - 1, 0), stride):
        end = min(start + context, len(tokens))
        yield tokens[start:end], end - scored
        scored = end
        if end == len(tokens):
            return
