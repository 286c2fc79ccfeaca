"""An engine without a model: it repeats the prompt, slowly if asked to, and counts its pages."""

import asyncio
import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from moe_jax.decoding.sampling_params import SamplingParams, sampling_params
from moe_jax.engine.loop import Load
from moe_jax.engine.outputs import Completion, Piece, Timing

PAGE = 16


class Bytes:
    """Tokens are bytes."""

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


@dataclass
class FakeEngine:
    """Text "boom" fails after two tokens, "halt" is cancelled by the engine after one."""

    pages: int = 4096
    seats: int = 8
    seconds: float = 0.0  # per token
    tokenizer: Bytes | None = field(default_factory=Bytes)
    calls: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    cancelled: int = 0

    def __post_init__(self):
        self._used = self._running = self._waiting = 0
        self._places = asyncio.Semaphore(self.seats)

    @property
    def load_now(self):
        free = self.pages - self._used
        return Load(running=self._running, waiting=self._waiting, free_pages=free, pages=self.pages)

    def agenerate(self, prompt, **options):
        params = sampling_params(**options)
        return self._beams(self._accept(prompt, options), params)

    def astream(self, prompt, **options):
        params = sampling_params(**options)
        return self._stream(self._accept(prompt, options), params)

    async def _beams(self, tokens: list[int], params: SamplingParams):
        answers = []
        for rank in range(params.num_return):
            text = f"beam {rank}"
            answers.append(self._completion(text, tuple(text.encode()), "length", tokens))
        return answers if params.num_return > 1 else answers[0]

    async def _stream(
        self, tokens: list[int], params: SamplingParams
    ) -> AsyncGenerator[Piece, None]:
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        pages = math.ceil((len(tokens) + params.max_tokens) / PAGE)
        self._used += pages
        self._running += 1
        done = False
        try:
            async for piece in self._pieces(tokens, params):
                done = piece.finish_reason is not None
                yield piece
        finally:
            self._used -= pages
            self._running -= 1
            self.cancelled += not done
            self._places.release()

    def _accept(self, prompt, options):
        if isinstance(prompt, str):
            tokens = list(prompt.encode())
        elif prompt and isinstance(prompt[0], dict):
            tokens = list(prompt[-1]["content"].encode())
        else:
            tokens = list(prompt)
        if not tokens:
            raise ValueError("the prompt is empty; give at least one token")
        if not all(0 <= token < 256 for token in tokens):
            raise ValueError("a token id is outside the vocabulary of 256 tokens")
        self.calls.append((prompt, options))
        return tokens

    async def _pieces(self, prompt: list[int], params: SamplingParams):
        shift = params.seed if params.temperature else 0
        text, given = "", []
        for count in range(1, params.max_tokens + 1):
            await asyncio.sleep(self.seconds)
            if prompt == list(b"boom") and count == 3:
                raise RuntimeError("the secret of the engine")
            token = prompt[(count - 1 + shift) % len(prompt)]
            given.append(token)
            new, reason = chr(token) if token < 128 else "", None
            if any(stop in text + new for stop in params.stop):
                new, reason = "", "stop"
            elif count == params.max_tokens:
                reason = "length"
            elif prompt == list(b"halt"):
                reason = "cancelled"
            text += new
            likely = [(token, -0.5), (token ^ 1, -math.inf), (token ^ 2, -1.5)]
            done = self._completion(text, tuple(given), reason, prompt) if reason else None
            yield Piece(
                text=new,
                token=token,
                logprob=-0.5,
                top_logprobs=tuple(likely[: params.logprobs]),
                finish_reason=reason,
                completion=done,
            )
            if reason:
                return

    def _completion(self, text, tokens, reason, prompt):
        return Completion(
            text=text,
            tokens=tokens,
            logprobs=(-0.5,) * len(tokens),
            finish_reason=reason,
            timing=Timing(queued=0.0, first_token=0.0, total=0.0, per_token=None),
            prompt_tokens=len(prompt),
            cached_tokens=len(prompt) // PAGE * PAGE,
        )
