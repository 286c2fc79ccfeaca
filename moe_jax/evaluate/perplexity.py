"""Perplexity with a stride, as it is usually given for causal language models."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import stdtrit

from moe_jax.engine.engine import Engine
from moe_jax.engine.progress import progress_bar

Tokens = Sequence[int] | Int[np.ndarray, " _"]


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts texts.

    Attributes:
      nats: the mean of minus the log probability of each scored token.
      error: its standard error; NaN of a single unit.
      tokens: how many were scored.
      units: what was taken as independent: the texts, or the windows of a single text.
    """

    nats: float
    error: float
    tokens: int
    units: int

    @property
    def value(self) -> float:
        """exp(nats)."""
        return math.exp(self.nats)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the perplexity (Student's t); NaN of a single unit."""
        half = float(stdtrit(max(self.units - 1, 1), 0.975)) * self.error
        return math.exp(self.nats - half), math.exp(self.nats + half)

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

    The sum is over scored tokens. The recipe in the documentation of Transformers
    (docs/source/en/perplexity.md) weighs each later window by one token less.

    The first window of a text scores all its tokens but the first; a later one those that are new
    in it, each with at least context - stride others before it; so a token that starts a window is
    never scored if stride = context.

    Args:
      texts: token ids.

    Raises:
      ValueError: stride is not between 1 and context, context is below 2 or more than the engine
        holds, no text has two tokens, or what was given are no texts.
    """
    check_texts(texts)
    check_windows(context, stride)
    spans = [list(windows(text, context, stride)) for text in texts]
    each: list[list[np.ndarray]] = [[] for _ in spans]
    with progress_bar(sum(map(len, spans)), "perplexity", "window", progress) as bar:
        for found, of_text in zip(each, spans, strict=True):
            for tokens, new in of_text:
                found.append(token_nats(engine, tokens)[-new:])
                bar.update()
    scored = [np.concatenate(found) for found in each if found]
    # Tokens of a text are not independent, nor are those of a window.
    return summarise(scored if len(scored) > 1 else [one for found in each for one in found])


def summarise(units: Sequence[Float[np.ndarray, " _"]]) -> Perplexity:
    """The mean over all tokens; its error from the units, as a ratio estimate over them."""
    nats, count = np.concatenate(units), len(units)
    mean = float(nats.mean())
    off = sum(float((one - mean).sum()) ** 2 for one in units)
    error = math.sqrt(off * count / (count - 1)) / nats.size if count > 1 else math.nan
    return Perplexity(mean, error, nats.size, count)


def check_windows(context: int, stride: int) -> None:
    """Raises ValueError unless windows of so many tokens, so far apart, leave no token out."""
    if not 1 <= stride <= context or context < 2:
        raise ValueError(
            f"windows of context={context} tokens, stride={stride} further each, leave tokens out; "
            "stride must be between 1 and context, context at least 2"
        )


def check_texts(texts: Any) -> None:
    """Raises ValueError unless these are lists of token ids, one of which has two."""
    if isinstance(texts, str) or any(np.ndim(text) != 1 for text in texts):
        raise ValueError(
            "give a list of texts, each a list of token ids as of engine.tokenizer.encode"
        )
    if not any(len(text) > 1 for text in texts):
        raise ValueError("no text has two tokens, so there is nothing to predict; give more text")


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
