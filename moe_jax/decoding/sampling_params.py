"""How one request wants its tokens chosen and when it wants to stop.

Knows no arrays: `moe_jax.decoding.sampling` turns the numbers of many requests into them.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, no_type_check

import numpy as np

from moe_jax.decoding.option_conflicts import REFUSED, check_conflicts
from moe_jax.decoding.option_values import flag, number, stop_strings, token_biases, whole

# The tokens generated so far -> the ids that may come next, or a mask [vocab] of them; None: any.
AllowedTokens = Callable[[Sequence[int]], Iterable[int] | np.ndarray | None]


@no_type_check  # checks its own fields, with errors that a user can read
@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """The wishes of one request; every value is checked, ValueError names the one that is wrong.

    Attributes:
      max_tokens: how many tokens to generate at most.
      min_tokens: until so many tokens are generated, those that end a text cannot come.
      temperature: divides the logits; 0 takes the likeliest token (greedy).
      top_k: keep the k likeliest tokens; None: all.
      top_p: keep the fewest likeliest tokens whose probabilities sum to top_p; 1: all.
      min_p: keep tokens at least min_p times as likely as the likeliest; 0: all.
      repetition_penalty: above 1, tokens of the prompt and of the text so far become less likely.
      presence_penalty: taken from the logits of tokens that were generated already; -2 to 2.
      frequency_penalty: taken from a token's logit each time that it was generated; -2 to 2.
      logit_bias: added to the logits of these tokens, {id: -100 to 100}; kept as sorted pairs.
      allowed_tokens: called before each token with those generated so far; returns the ids that
        may come next, a mask of the vocabulary, or None for all. For structured output.
      logprobs: how many of the likeliest tokens to report at each place, 0 to 20.
      seed: with the same seed and prompt a request gives the same tokens, in any batch.
      stop: the text ends before the first of these strings; one string may be given alone.
      ignore_eos: go on after the model's end-of-text tokens.
      num_beams: above 1, beam search with so many beams, as in transformers.
      num_return: how many of the beams' texts to return, best first.
      length_penalty: a beam's score is its log-probability over length**length_penalty.
      early_stopping: True ends the search with num_beams finished texts, False when a better one
        is unlikely, "never" when none is possible.
      prompt_lookup: draft so many tokens a step from what followed the last ones earlier in the
        text, and verify them at once; greedy only; 0: off. It changes no token but where the two
        likeliest are equal but for rounding (in bfloat16): several tokens round otherwise than one.
      priority: requests with a higher one are served first.
    """

    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    allowed_tokens: AllowedTokens | None = None
    logprobs: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    num_beams: int = 1
    num_return: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    prompt_lookup: int = 0
    priority: int = 0

    def __post_init__(self):
        checked: dict[str, object] = {
            "max_tokens": whole("max_tokens", self.max_tokens, 1, None),
            "min_tokens": whole("min_tokens", self.min_tokens, 0, None),
            "temperature": number(
                "temperature", self.temperature, "from 0 (greedy) to 1e6", 0.0, 1e6
            ),
            "top_k": None if self.top_k is None else whole("top_k", self.top_k, 1, None),
            "top_p": number("top_p", self.top_p, "above 0 and at most 1", 0.0, 1.0, open_low=True),
            "min_p": number("min_p", self.min_p, "from 0 to 1", 0.0, 1.0),
            # Beyond this range float32 logits overflow.
            "repetition_penalty": number(
                "repetition_penalty", self.repetition_penalty, "from 0.001 to 1000", 1e-3, 1e3
            ),
            "presence_penalty": number(
                "presence_penalty", self.presence_penalty, "from -2 to 2", -2.0, 2.0
            ),
            "frequency_penalty": number(
                "frequency_penalty", self.frequency_penalty, "from -2 to 2", -2.0, 2.0
            ),
            "logit_bias": token_biases(self.logit_bias),
            "logprobs": whole("logprobs", self.logprobs, 0, 20),
            "seed": whole("seed", self.seed, 0, 2**32 - 1),
            "stop": stop_strings(self.stop),
            "ignore_eos": flag("ignore_eos", self.ignore_eos),
            "num_beams": whole("num_beams", self.num_beams, 1, None),
            "num_return": whole("num_return", self.num_return, 1, None),
            # Beyond this range the power of a length leaves float32.
            "length_penalty": number(
                "length_penalty", self.length_penalty, "from -5 to 5", -5.0, 5.0
            ),
            "prompt_lookup": whole("prompt_lookup", self.prompt_lookup, 0, 7),
            "priority": whole("priority", self.priority, -(2**31), 2**31 - 1),
        }
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(
                f'early_stopping must be True, False or "never", got {self.early_stopping!r}'
            )
        if self.allowed_tokens is not None and not callable(self.allowed_tokens):
            raise ValueError(
                "allowed_tokens must be a function of the tokens generated so far, "
                f"got {self.allowed_tokens!r}"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in defaults}
        changed = {name for name, value in values.items() if value != defaults[name]}
        check_conflicts(values, changed)

    @property
    def counts_tokens(self) -> bool:
        """Whether the choice depends on which tokens the text holds (`text_counts`)."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def plain_greedy(self) -> bool:
        """Whether the likeliest token of the unmodified logits is always the chosen one."""
        return (
            self.temperature == 0
            and not self.counts_tokens
            and not self.logit_bias
            and self.min_tokens == 0
            and self.allowed_tokens is None
        )


def sampling_params(**options: Any) -> SamplingParams:
    """SamplingParams from keywords; an unknown one is a ValueError that suggests the closest."""
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in options:
        if name in REFUSED:
            raise ValueError(f"{name} is not supported: {REFUSED[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"unknown option {name!r}; {hint}the sampling options are {', '.join(known)}"
            )
    return SamplingParams(**options)


def check_vocab(params: SamplingParams, vocab: int) -> None:
    """Raises ValueError if a token that the options name is not one of the model's."""
    outside = [token for token in dict(params.logit_bias) if token >= vocab]
    if outside:
        raise ValueError(
            f"logit_bias names token {outside[0]}, but the model's vocabulary has {vocab} tokens "
            f"(0 to {vocab - 1}); remove it"
        )
