"""What a request asks of the engine: its prompts and the options of each sequence."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_jax.server.errors import ApiError
from moe_jax.server.limits import Limits
from moe_jax.server.protocol import SharedRequest

_SEEDS = 2**32

# Fields that the engine knows by the same name, and leaves at its own default when they are absent.
_SAME = (
    "frequency_penalty",
    "ignore_eos",
    "length_penalty",
    "early_stopping",
    "min_p",
    "min_tokens",
    "num_beams",
    "presence_penalty",
    "priority",
    "repetition_penalty",
    "stop",
    "top_p",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One call of the engine.

    Attributes:
      prompt: text, token ids or messages.
      options: the engine's options.
      choice: the index of its first answer in the response.
      answers: how many answers it gives; more than one only with beams.
      first: whether this is the first job of its prompt, whose tokens are counted once.
    """

    prompt: Any
    options: dict[str, Any]
    choice: int
    answers: int
    first: bool


def make_jobs(
    request: SharedRequest,
    prompts: Sequence[Any],
    *,
    limits: Limits,
    max_tokens: int,
    top_logprobs: int | None,
) -> list[Job]:
    """One job per prompt and sample; beams are one job with several answers.

    Args:
      request: the fields that both kinds of request have.
      prompts: what to continue.
      limits: of prompts and samples.
      max_tokens: tokens per sequence.
      top_logprobs: how many alternatives per token the client wants; None: no log-probabilities.

    Raises ApiError (400) for too many prompts or samples, and for what cannot go together.
    """
    samples = 1 if request.n is None else request.n
    for name, count, limit in [
        ("prompt", len(prompts), limits.prompts),
        ("n", samples, limits.samples),
    ]:
        if not 1 <= count <= limit:
            raise ApiError(
                400, f"{name} must ask for 1 to {limit}, got {count}; send several requests",
                param=name,
            )  # fmt: skip
    beams = request.num_beams is not None and request.num_beams > 1
    options = _options(request, max_tokens, beams)
    if beams:
        _check_beams(request, top_logprobs)
        return [
            Job(
                prompt=prompt,
                options=options | {"num_return": samples},
                choice=index * samples,
                answers=samples,
                first=True,
            )
            for index, prompt in enumerate(prompts)
        ]
    if top_logprobs:
        options["logprobs"] = top_logprobs
    # Clients that send no seed want another answer each time.
    seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed
    if not 0 <= seed < _SEEDS:
        raise ApiError(400, f"seed must be in 0..{_SEEDS - 1}, got {seed}", param="seed")
    return [
        Job(
            prompt=prompt,
            options=options | {"seed": (seed + sample) % _SEEDS},
            choice=index * samples + sample,
            answers=1,
            first=sample == 0,
        )
        for index, prompt in enumerate(prompts)
        for sample in range(samples)
    ]


def _options(request: SharedRequest, max_tokens: int, beams: bool) -> dict[str, Any]:
    values = {name: getattr(request, name) for name in _SAME}
    options = {name: value for name, value in values.items() if value is not None}
    options["max_tokens"] = max_tokens
    # OpenAI's default is 1; beams are not sampled.
    default = 0.0 if beams else 1.0
    options["temperature"] = default if request.temperature is None else request.temperature
    if request.top_k is not None and request.top_k not in (0, -1):  # other servers' words for all
        options["top_k"] = request.top_k
    if request.logit_bias:
        options["logit_bias"] = _logit_bias(request.logit_bias)
    return options


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    """JSON has no numbers for keys."""
    for token in given:
        if not (token.isascii() and token.isdecimal()):
            raise ApiError(
                400,
                f"logit_bias maps token ids to numbers, got the key {token!r}",
                param="logit_bias",
            )
    return {int(token): value for token, value in given.items()}


def _check_beams(request: SharedRequest, top_logprobs: int | None) -> None:
    if request.stream:
        raise ApiError(
            400, "beams are known only at their end: num_beams above 1 cannot be streamed",
            param="stream",
        )  # fmt: skip
    if top_logprobs is not None:
        raise ApiError(
            400, "logprobs are not given for beams; leave out logprobs or num_beams",
            param="logprobs",
        )  # fmt: skip
