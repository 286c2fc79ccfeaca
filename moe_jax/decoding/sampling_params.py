"""How one request wants its tokens chosen and when it wants to stop.

Knows no arrays: `moe_jax.decoding.sampling` turns the numbers of many requests into them.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np


@no_type_check  # checks its own fields, with errors that a user can read
@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """The wishes of one request; every value is checked, ValueError names the one that is wrong.

    Attributes:
      max_tokens: how many tokens to generate at most.
      temperature: divides the logits; 0 takes the likeliest token (greedy).
      top_k: keep the k likeliest tokens; None: all.
      top_p: keep the fewest likeliest tokens whose probabilities sum to top_p; 1: all.
      min_p: keep tokens at least min_p times as likely as the likeliest; 0: all.
      repetition_penalty: above 1, tokens of the prompt and of the text so far become less likely.
      seed: with the same seed and prompt a request gives the same tokens, in any batch.
      stop: the text ends before the first of these strings; one string may be given alone.
      ignore_eos: go on after the model's end-of-text tokens.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        checked: dict[str, object] = {
            "max_tokens": _whole("max_tokens", self.max_tokens, 1, None),
            "temperature": _number(
                "temperature", self.temperature, "from 0 (greedy) to 1e6", 0.0, 1e6
            ),
            "top_k": None if self.top_k is None else _whole("top_k", self.top_k, 1, None),
            "top_p": _number("top_p", self.top_p, "above 0 and at most 1", 0.0, 1.0, open_low=True),
            "min_p": _number("min_p", self.min_p, "from 0 to 1", 0.0, 1.0),
            # Beyond this range float32 logits overflow.
            "repetition_penalty": _number(
                "repetition_penalty", self.repetition_penalty, "from 0.001 to 1000", 1e-3, 1e3
            ),
            "seed": _whole("seed", self.seed, 0, 2**32 - 1),
            "stop": _stop_strings(self.stop),
        }
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def sampling_params(**options: Any) -> SamplingParams:
    """SamplingParams from keywords; an unknown one is a ValueError that suggests the closest."""
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"unknown option {name!r}; {hint}the sampling options are {', '.join(known)}"
            )
    return SamplingParams(**options)


def _whole(name: str, value: object, low: int, high: int | None) -> int:
    """A whole number within bounds, as int; bool is refused although it is an int."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {limits}, got {value!r}")
    return int(value)


def _number(
    name: str, value: object, limits: str, low: float, high: float, open_low: bool = False
) -> float:
    """A number within bounds, as float; NaN is within no bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ValueError(f"{name} must be a number {limits}, got {value!r}")
    if not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{name} must be a number {limits}, got {value!r}")
    return float(value)


def _stop_strings(stop: object) -> tuple[str, ...]:
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Iterable):
        raise ValueError(f"stop must be a string or a list of strings, got {stop!r}")
    strings: list[str] = []
    for index, text in enumerate(stop):
        if not isinstance(text, str):
            raise ValueError(f"stop string {index} must be a string, got {text!r}")
        if not text:
            raise ValueError(f"stop string {index} is empty, which would stop at once; remove it")
        strings.append(text)
    return tuple(strings)
