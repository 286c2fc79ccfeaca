"""The engine: one loaded model and everything a user asks of it."""

from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.checkpoint.chat import ChatTemplate
from moe_jax.checkpoint.orbax import save_checkpoint
from moe_jax.checkpoint.tokenizer import Tokenizer, missing_tokenizer
from moe_jax.config import ModelConfig
from moe_jax.decoding.sampling_params import check_vocab, sampling_params
from moe_jax.engine.arrays import arrays_by_target
from moe_jax.engine.batch import PREFILL_BUCKETS, NewTokens
from moe_jax.engine.driver import Driver
from moe_jax.engine.handle import Handle
from moe_jax.engine.loop import EngineLoop, Load
from moe_jax.engine.observer import StepObserver
from moe_jax.engine.outputs import Completion, Piece
from moe_jax.engine.plan import Plan
from moe_jax.engine.progress import RequestProgress
from moe_jax.engine.prompts import encode_prompt, is_many
from moe_jax.engine.recording import record_routing
from moe_jax.engine.request import Request, check_beams_fit
from moe_jax.engine.stats import Stats
from moe_jax.placement.timeline import Timeline, make_timeline
from moe_jax.placement.trace import RoutingTrace


class Engine:
    """A model in memory; made by `moe_jax.load`.

    Attributes:
      plan: what lives where, the speed to expect and what limits it; print it.
      config: the model's sizes and switches.
      tokenizer: text to token ids and back; None if the folder has none.
      stop_tokens: the ids that end a text.
      max_tokens: how many tokens of KV there is room for; no sequence can have more.
    """

    def __init__(
        self,
        loop: EngineLoop,
        observer: StepObserver,
        plan: Plan,
        *,
        config: ModelConfig,
        source: Path,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        stop_tokens: frozenset[int],
        max_tokens: int,
        max_seqs: int,
        progress: bool,
    ):
        self.plan = plan
        self.config = config
        self.tokenizer = tokenizer
        self._loop = loop
        self._driver = Driver(loop)
        self._observer = observer
        self._source = source
        self._template = template
        self.stop_tokens = stop_tokens
        self.max_tokens = max_tokens
        self._max_seqs = max_seqs
        self._progress = progress

    def generate(self, prompts: Any, **options: Any) -> Any:
        """Continues one prompt, or each of a list of prompts; they run together.

        A prompt is text, a list of token ids, or a list of chat messages. Options are the fields of
        `SamplingParams`: max_tokens, temperature (0, the default, is greedy), top_k, top_p, min_p,
        penalties, seed, stop, num_beams and so on. A request's tokens depend on its own prompt and
        seed, not on what runs beside it.

        Returns:
          A Completion; for a list of prompts a list of them in order. With num_return above 1,
          each is a list of that many, the best first.

        Raises ValueError for a bad prompt or option before anything is computed. An interrupt ends
        these requests, and leaves a working engine.
        """
        many = is_many(prompts)
        requests = [self._request(one, options) for one in (prompts if many else [prompts])]
        handles = [self._loop.submit(request) for request in requests]
        progress = RequestProgress(handles, self._progress and _is_long(requests))
        try:
            for handle in handles:
                while not handle.done:
                    self._loop.advance(lambda handle=handle: handle.done)
                    progress.update()
            results = [handle.result() for handle in handles]
        finally:
            progress.close()
            for handle in handles:
                handle.cancel()
        return results if many else results[0]

    def submit(self, prompt: Any, **options: Any) -> Handle:
        """Queues a prompt and returns at once; options as in `generate`.

        The handle gives the pieces or the result, running the steps it needs, and cancels.

        Raises ValueError for a bad prompt or option.
        """
        return self._loop.submit(self._one_request(prompt, options))

    def stream(self, prompt: Any, **options: Any) -> Iterator[Piece]:
        """Continues one prompt, yielding text as soon as it is whole; options as in `generate`.

        Closing the iterator cancels the request.
        """
        return self.submit(prompt, **options).pieces()

    def astream(self, prompt: Any, **options: Any) -> AsyncGenerator[Piece, None]:
        """`stream` for event loops; many at once run together, in a thread of the engine.

        Raises ValueError at once for a bad prompt or option.
        """
        return self._driver.pieces(self._one_request(prompt, options))

    def agenerate(
        self, prompt: Any, **options: Any
    ) -> Coroutine[Any, Any, Completion | list[Completion]]:
        """`generate` of one prompt for event loops; cancelling the awaiting task cancels it."""
        return self._driver.result(self._one_request(prompt, options))

    @property
    def load_now(self) -> Load:
        """How many requests run and wait, and how much of the KV cache is free."""
        return self._loop.load

    def logits(
        self, tokens: Any, *, prompt_tokens: int | None = None
    ) -> Float[np.ndarray, "... vocab"]:
        """The float32 logits after every token: int [seq] or [batch, seq] -> [..., vocab].

        The first `prompt_tokens` of each row are read as a prompt, the others one by one as in
        decoding; None: all are a prompt.

        Raises ValueError for what are no tokens, more than fit, or fewer than `prompt_tokens`.
        """
        ids = np.asarray(tokens)
        if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"logits takes integer token ids of shape [seq] or [batch, seq], "
                f"got {ids.dtype} of shape {ids.shape}"
            )
        if not len(ids):
            raise ValueError("logits was given no tokens; give at least one row of token ids")
        rows = [self._encode(row.tolist()) for row in np.atleast_2d(ids)]
        prompt = len(rows[0]) if prompt_tokens is None else prompt_tokens
        _check_part(prompt, len(rows[0]))
        runner, found = self._loop.runner, []
        for row in rows:
            with self._loop.borrow_pages(len(row)) as pages:
                parts = []
                if prompt:
                    new = NewTokens(row[:prompt], 0, len(row), pages)
                    parts.append(runner.all_logits(new))
                if row[prompt:]:
                    new = NewTokens(row[prompt:], prompt, len(row), pages)
                    parts.append(runner.decoded_logits(new))
            found.append(np.concatenate(parts))
        logits = np.stack(found)
        return logits if ids.ndim == 2 else logits[0]

    def routing(self, prompt: Any, *, prompt_tokens: int = 0) -> RoutingTrace:
        """Which experts the tokens of a text are routed to, for `moe_jax.placement.simulate`.

        The first `prompt_tokens` tokens are read as a prompt, the others one by one as in decoding.

        Raises ValueError for a bad prompt, or if it has fewer than `prompt_tokens` tokens.
        """
        tokens = self._encode(prompt)
        _check_part(prompt_tokens, len(tokens))
        with self._loop.borrow_pages(len(tokens)) as pages:
            return record_routing(self._loop.runner, tokens, prompt_tokens, pages)

    def last_routing(
        self,
    ) -> tuple[Int[np.ndarray, "layers experts"], Bool[np.ndarray, "layers experts"]]:
        """Tokens of each expert in the last step of a generation, and which were resident.

        Experts that were cut (`load(expert_pieces=)`) count as their pieces.

        Raises ValueError if nothing was generated yet.
        """
        report, residency = self._observer.last_step()
        return np.asarray(report.tally.counts), residency.resident

    def timeline(self) -> Timeline:
        """What device, link and host should have done during the last step of a generation.

        Each expert in the way in which it ran; the times are planned, neither measured nor
        corrected by what was (`stats` compares). Print it, or draw it with scripts/timeline.py.

        Raises ValueError if nothing was generated yet.
        """
        report, _ = self._observer.last_step()
        model = self._loop.runner.model
        timeline = make_timeline(
            np.asarray(report.tally.counts),
            np.asarray(report.tally.modes),
            model.curves,
            self._observer.monitor.dense_seconds(report.tokens) / self.config.layers,
        )
        pieces = model.config.moe.pieces
        whole = [replace(span, expert=span.expert // pieces) for span in timeline.spans]
        return replace(timeline, spans=tuple(whole))

    @property
    def stats(self) -> Stats:
        """Totals since loading: tokens, seconds, experts by placement, bytes."""
        programs = self._loop.runner.programs
        with self._loop.paused():
            self._observer.after_other()
        return replace(
            self._observer.monitor.stats(programs.traces),
            swapped=self._observer.mover.swaps,
            failed_swaps=self._observer.mover.failures,
            prefetched=programs.prefetcher.begun,
            prefetched_useful=programs.prefetcher.useful,
            cached_tokens=self._loop.seating.cached_tokens,
            restarts=self._loop.seating.restarts,
        )

    def save(self, folder: str | Path) -> None:
        """Writes an Orbax checkpoint with config and tokenizer that `moe_jax.load` reads.

        The folder appears only when it is complete. Raises ValueError if it is there already.
        """
        with self._loop.paused():
            arrays = arrays_by_target(self._loop.runner.model)
        save_checkpoint(Path(folder), arrays, self._source)

    def _encode(self, prompt: Any) -> tuple[int, ...]:
        return encode_prompt(
            prompt,
            tokenizer=self.tokenizer,
            template=self._template,
            folder=self._source,
            vocab=self.config.vocab,
            capacity=self.max_tokens,
        )

    def _one_request(self, prompt: Any, options: dict[str, Any]) -> Request:
        if is_many(prompt):
            raise ValueError(
                "this takes one prompt, and was given a list of them; call it once for each, or "
                "use generate"
            )
        return self._request(prompt, options)

    def _request(self, prompt: Any, options: dict[str, Any]) -> Request:
        params = sampling_params(**options)
        check_vocab(params, self.config.vocab)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop strings need a tokenizer: {missing_tokenizer(self._source)}")
        if params.num_beams > self._max_seqs:
            raise ValueError(
                f"num_beams={params.num_beams} needs as many seats, the engine has "
                f"max_seqs={self._max_seqs}; load the model with a larger max_seqs="
            )
        tokens = self._encode(prompt)
        # The last sampled token is never stored, hence one more than there is room for.
        limit = min(params.max_tokens, self.max_tokens - len(tokens) + 1)
        if params.num_beams > 1:
            check_beams_fit(len(tokens), params, self._loop.seating.pages)
            limit = params.max_tokens
        return Request(
            prompt=tokens,
            params=params,
            limit=limit,
            stop_tokens=frozenset() if params.ignore_eos else self.stop_tokens,
            # The tokens before decide whether the continuation of a text starts with a space.
            context=tokens[-8:] if isinstance(prompt, str) else (),
            tokenizer=self.tokenizer,
        )


def _check_part(prompt_tokens: int, tokens: int) -> None:
    if not 0 <= prompt_tokens <= tokens:
        raise ValueError(
            f"prompt_tokens must lie between 0 and the {tokens} tokens of the text, "
            f"got {prompt_tokens}"
        )


def _is_long(requests: Sequence[Request]) -> bool:
    """Whether a progress bar is worth while."""
    return len(requests) > 1 or len(requests[0].prompt) > 2 * PREFILL_BUCKETS[-1]
