"""Continues a static batch of token prompts and tells what every step adds to every sequence.

Knows sampling, stopping and detokenisation; the steps themselves are the runner's.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float

from moe_jax.cache.paged_kv import assign_pages
from moe_jax.checkpoint.tokenizer import Tokenizer
from moe_jax.decoding.sampling import sample, sample_greedy, stack_options
from moe_jax.decoding.sampling_params import SamplingParams
from moe_jax.decoding.stop_strings import StopScanner
from moe_jax.decoding.stream_decoder import StreamDecoder
from moe_jax.engine.outputs import FinishReason, Piece
from moe_jax.engine.progress import progress_bar
from moe_jax.engine.runner import PREFILL_BUCKETS, NewTokens, Runner


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
      limit: new tokens at most: max_tokens, or less where the KV cache ends.
      stop_tokens: ids that end the text.
      context: the last tokens before the continuation, where its first space matters.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    limit: int
    stop_tokens: frozenset[int]
    context: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepTime:
    """One prefill or decode step, sampling included.

    Attributes:
      prompt_tokens: tokens prefilled; 0 in decode.
      sampled_tokens: one for each sequence that ran.
      seconds: wall-clock.
    """

    prompt_tokens: int
    sampled_tokens: int
    seconds: float


class _Sequence:
    """One request while it runs: its tokens, its pages, and its text so far."""

    def __init__(
        self, index: int, request: Request, pages: np.ndarray, tokenizer: Tokenizer | None
    ):
        self.index = index
        self.request = request
        self.pages = pages
        self.generated: list[int] = []
        self._decoder = StreamDecoder(tokenizer, request.context) if tokenizer else None
        self._scanner = StopScanner(request.params.stop)

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.generated)

    def next_input(self) -> NewTokens:
        """The last token, which is not in the pages yet."""
        return NewTokens(self.generated[-1:], self.length - 1, self.length, self.pages)

    def accept(self, token: int, logprob: float) -> Piece:
        """Adds a sampled token; the piece says whether the sequence has ended."""
        self.generated.append(token)
        reason: FinishReason | None = None
        text = ""
        if token in self.request.stop_tokens:
            reason = "stop"
        else:
            text, stopped = self._scan(self._decoder.push(token) if self._decoder else "")
            if stopped:
                return Piece(text=text, token=token, logprob=logprob, finish_reason="stop")
            if len(self.generated) >= self.request.limit:
                reason = "length"
        if reason is not None:
            held, stopped = self._scan(self._decoder.flush() if self._decoder else "")
            text += held
            if stopped:
                reason = "stop"
            else:
                text += self._scanner.flush()
        return Piece(text=text, token=token, logprob=logprob, finish_reason=reason)

    def _scan(self, text: str) -> tuple[str, bool]:
        return self._scanner.push(text) if text else ("", False)


def generate_batch(
    runner: Runner,
    requests: Sequence[Request],
    tokenizer: Tokenizer | None,
    after_step: Callable[[StepTime], None],
    show_progress: bool = False,
) -> Iterator[tuple[int, Piece]]:
    """Prefills each prompt, then decodes all sequences together until each has ended.

    `after_step` is called after each of these steps, before its pieces are handed out.
    Yields (index of the request, piece). Closing the iterator early is safe: pages belong to the
    batch and are handed out anew to the next one.
    """
    totals = [len(request.prompt) + request.limit - 1 for request in requests]
    tables = assign_pages(totals, runner.pages)
    running: list[_Sequence] = []
    sampler = _Sampler(runner.model.config.vocab)
    for index, request in enumerate(requests):
        sequence = _Sequence(index, request, tables[index], tokenizer)
        started = time.perf_counter()
        logits = _prefill(runner, sequence, show_progress)
        piece = sampler.step([sequence], logits)[0]
        after_step(StepTime(len(request.prompt), 1, time.perf_counter() - started))
        if piece.finish_reason is None:
            running.append(sequence)
        yield index, piece
    while running:
        started = time.perf_counter()
        bucket = 1 << (len(running) - 1).bit_length()
        logits = runner.decode([sequence.next_input() for sequence in running], bucket)
        pieces = sampler.step(running, logits)
        after_step(StepTime(0, len(running), time.perf_counter() - started))
        stepped = list(zip(running, pieces, strict=True))
        running = [sequence for sequence, piece in stepped if piece.finish_reason is None]
        for sequence, piece in stepped:
            yield sequence.index, piece


def _prefill(runner: Runner, sequence: _Sequence, show: bool) -> Float[Array, "1 vocab"]:
    prompt = sequence.request.prompt
    new = NewTokens(prompt, 0, len(prompt), sequence.pages)
    long = len(prompt) > 2 * PREFILL_BUCKETS[-1]
    with progress_bar(len(prompt), "prefill", "tok", show and long) as bar:
        return runner.prefill(new, on_chunk=lambda tokens: bar.update(tokens))


class _Sampler:
    """Draws the next token of every running sequence."""

    def __init__(self, vocab: int):
        self._vocab = vocab

    def step(
        self, sequences: Sequence[_Sequence], logits: Float[Array, "bucket vocab"]
    ) -> list[Piece]:
        """Samples one token per sequence; rows past the last sequence are ignored."""
        bucket = logits.shape[0]
        params = [sequence.request.params for sequence in sequences]
        padded = params + [SamplingParams()] * (bucket - len(params))
        plain = all(p.temperature == 0 and p.repetition_penalty == 1 for p in params)
        if plain:
            tokens, logprobs = sample_greedy(logits)
        else:
            position = np.zeros(bucket, np.int32)
            position[: len(sequences)] = [sequence.length for sequence in sequences]
            options = stack_options(padded, self._vocab)
            tokens, logprobs = sample(logits, options, position, self._seen(sequences, bucket))
        tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
        pieces = []
        for row, sequence in enumerate(sequences):
            if math.isnan(logprobs[row]):
                raise ValueError(
                    f"the model computed NaN or infinite logits for request {sequence.index} at "
                    f"position {sequence.length}; check the checkpoint, or load it with "
                    "dtype='float32'"
                )
            pieces.append(sequence.accept(int(tokens[row]), float(logprobs[row])))
        return pieces

    def _seen(self, sequences: Sequence[_Sequence], bucket: int) -> np.ndarray:
        """Which tokens each sequence contains, where a penalty asks for it."""
        seen = np.zeros((bucket, self._vocab), bool)
        for row, sequence in enumerate(sequences):
            if sequence.request.params.repetition_penalty != 1:
                seen[row, list(sequence.request.prompt)] = True
                seen[row, sequence.generated] = True
        return seen
