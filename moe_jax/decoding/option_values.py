"""Checks single values that a user gave as options; ValueError says what a value may be.

Knows no option by name: the caller names it, and says which values are good.
"""

from collections.abc import Iterable, Mapping

import numpy as np

# As many as the OpenAI API allows; their arrays are padded to fixed sizes.
MAX_BIASES = 300
_MAX_BIAS = 100.0


def whole(name: str, value: object, low: int, high: int | None) -> int:
    """A whole number within bounds, as int; bool is refused although it is an int."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {limits}, got {value!r}")
    return int(value)


def number(
    name: str, value: object, limits: str, low: float, high: float, open_low: bool = False
) -> float:
    """A number within bounds, as float; NaN is within no bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ValueError(f"{name} must be a number {limits}, got {value!r}")
    if not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{name} must be a number {limits}, got {value!r}")
    return float(value)


def flag(name: str, value: object) -> bool:
    """True or False, nothing that only counts as such."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def stop_strings(stop: object) -> tuple[str, ...]:
    """One string or several, none of them empty, as a tuple."""
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


def token_biases(bias: object) -> tuple[tuple[int, float], ...]:
    """A mapping of token ids to numbers, or the pairs this function made of one, as pairs."""
    if isinstance(bias, tuple):  # what dataclasses.replace passes on
        bias = dict(bias)
    if not isinstance(bias, Mapping):
        raise ValueError(
            f"logit_bias must be a mapping of token ids to numbers, such as {{50: -100}}, "
            f"got {bias!r}"
        )
    if len(bias) > MAX_BIASES:
        raise ValueError(
            f"logit_bias has {len(bias)} tokens, but at most {MAX_BIASES} are possible; "
            "forbid many tokens with allowed_tokens"
        )
    pairs = []
    for token, value in bias.items():
        token = whole("each token id of logit_bias", token, 0, None)
        limits = f"from {-_MAX_BIAS:g} to {_MAX_BIAS:g}"
        pairs.append(
            (token, number(f"logit_bias of token {token}", value, limits, -_MAX_BIAS, _MAX_BIAS))
        )
    return tuple(sorted(pairs))
