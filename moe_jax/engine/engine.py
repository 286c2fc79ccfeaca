"""The engine: one loaded model and everything a user asks of it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.cache.paged_kv import assign_pages
from moe_jax.checkpoint.chat import ChatTemplate
from moe_jax.checkpoint.orbax import save_checkpoint
from moe_jax.checkpoint.tokenizer import Tokenizer, missing_tokenizer
from moe_jax.decoding.sampling_params import sampling_params
from moe_jax.engine.arrays import arrays_by_target
from moe_jax.engine.generation import Request, StepTime, generate_batch
from moe_jax.engine.monitor import Monitor
from moe_jax.engine.mover import ExpertMover
from moe_jax.engine.outputs import Completion, Piece
from moe_jax.engine.plan import Plan
from moe_jax.engine.prompts import encode_prompt, is_many
from moe_jax.engine.recording import record_routing
from moe_jax.engine.runner import NewTokens, Runner, StepReport
from moe_jax.engine.stats import Stats
from moe_jax.placement.planner import plan_layers
from moe_jax.placement.residency import Residency
from moe_jax.placement.timeline import Timeline, make_timeline
from moe_jax.placement.trace import RoutingTrace


class Engine:
    """A model in memory; made by `moe_jax.load`.

    Attributes:
      plan: what lives where, the speed to expect and what limits it; print it.
      config: the model's sizes and switches.
    """

    def __init__(
        self,
        runner: Runner,
        plan: Plan,
        mover: ExpertMover,
        *,
        source: Path,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        stop_tokens: frozenset[int],
        max_tokens: int,
        max_seqs: int,
        progress: bool,
    ):
        self.plan = plan
        self.config = runner.model.config
        self.tokenizer = tokenizer
        self._runner = runner
        self._source = source
        self._template = template
        self._stop_tokens = stop_tokens
        self._capacity = max_tokens
        self._max_seqs = max_seqs
        self._progress = progress
        self._monitor = Monitor(plan.memory, runner.model.curves)
        self._mover = mover
        self._last_step: tuple[StepReport, Residency] | None = None
        self._run_number = 0

    def generate(self, prompts: Any, **options: Any) -> Completion | list[Completion]:
        """Continues one prompt, or each of a list of prompts in order.

        A prompt is text, a list of token ids, or a list of chat messages. Options are the fields
        of `SamplingParams`: max_tokens, temperature (0, the default, is greedy), top_k, top_p,
        min_p, repetition_penalty, seed, stop, ignore_eos. A request's tokens depend on its own
        prompt and seed, not on the others in the list.

        Raises ValueError for a bad prompt or option before anything is computed.
        """
        many = is_many(prompts)
        requests = self._requests(list(prompts) if many else [prompts], options)
        pieces: list[list[Piece]] = [[] for _ in requests]
        for index, piece in self._run(requests):
            pieces[index].append(piece)
        completions = [_join(one) for one in pieces]
        return completions if many else completions[0]

    def stream(self, prompt: Any, **options: Any) -> Iterator[Piece]:
        """Continues one prompt, yielding text as soon as it is whole; options as in `generate`."""
        if is_many(prompt):
            raise ValueError("stream takes one prompt; use generate for a list")
        requests = self._requests([prompt], options)
        return (piece for _, piece in self._run(requests))

    def logits(self, tokens: Any) -> Float[np.ndarray, "... vocab"]:
        """The float32 logits after every token: int [seq] or [batch, seq] -> [..., vocab]."""
        ids = np.asarray(tokens)
        if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"logits takes integer token ids of shape [seq] or [batch, seq], "
                f"got {ids.dtype} of shape {ids.shape}"
            )
        if not len(ids):
            raise ValueError("logits was given no tokens; give at least one row of token ids")
        rows = [self._encode(row.tolist()) for row in np.atleast_2d(ids)]
        self._take_over()
        parts = []
        for row in rows:
            (pages,) = assign_pages([len(row)], self._runner.pages)
            parts.append(self._runner.all_logits(NewTokens(row, 0, len(row), pages)))
        logits = np.stack(parts)
        return logits if ids.ndim == 2 else logits[0]

    def routing(self, prompt: Any, *, prompt_tokens: int = 0) -> RoutingTrace:
        """Which experts the tokens of a text are routed to, for `moe_jax.placement.simulate`.

        The first `prompt_tokens` tokens are read as a prompt, the others one by one as in decoding.

        Raises ValueError for a bad prompt, or if it has fewer than `prompt_tokens` tokens.
        """
        tokens = self._encode(prompt)
        if not 0 <= prompt_tokens <= len(tokens):
            raise ValueError(
                f"prompt_tokens must lie between 0 and the {len(tokens)} tokens of the text, "
                f"got {prompt_tokens}"
            )
        self._take_over()
        return record_routing(self._runner, tokens, prompt_tokens)

    def last_routing(
        self,
    ) -> tuple[Int[np.ndarray, "layers experts"], Bool[np.ndarray, "layers experts"]]:
        """Tokens of each expert in the last step of a generation, and which were resident.

        Raises ValueError if nothing was generated yet.
        """
        report, residency = self._step_to_show()
        return np.asarray(report.tally.counts), residency.resident

    def timeline(self) -> Timeline:
        """What device, link and host should have done during the last step of a generation.

        As planned, not as measured. Print it, or draw it with scripts/timeline.py.

        Raises ValueError if nothing was generated yet.
        """
        report, _ = self._step_to_show()
        model, (counts, resident) = self._runner.model, self.last_routing()
        plans = plan_layers(self._runner.programs.planner, counts, resident, model.curves)
        return make_timeline(
            counts,
            np.asarray(plans.mode),
            model.curves,
            self._monitor.dense_seconds(report.tokens) / self.config.layers,
        )

    @property
    def stats(self) -> Stats:
        """Totals since loading: tokens, seconds, experts by placement, bytes."""
        self._monitor.after_other(self._runner.take_reports())
        stats = self._monitor.stats(self._runner.programs.traces, self._mover.swaps)
        done = self._runner.programs.prefetcher
        return replace(stats, prefetched=done.begun, prefetched_useful=done.useful)

    def save(self, folder: str | Path) -> None:
        """Writes an Orbax checkpoint with config and tokenizer that `moe_jax.load` reads.

        The folder appears only when it is complete. Raises ValueError if it is there already.
        """
        save_checkpoint(Path(folder), arrays_by_target(self._runner.model), self._source)

    def _encode(self, prompt: Any) -> tuple[int, ...]:
        return encode_prompt(
            prompt,
            tokenizer=self.tokenizer,
            template=self._template,
            folder=self._source,
            vocab=self.config.vocab,
            capacity=self._capacity,
        )

    def _requests(self, prompts: Sequence[Any], options: dict[str, Any]) -> list[Request]:
        params = sampling_params(**options)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop strings need a tokenizer: {missing_tokenizer(self._source)}")
        stop_tokens = frozenset() if params.ignore_eos else self._stop_tokens
        requests = []
        for prompt in prompts:
            tokens = self._encode(prompt)
            # The last sampled token is never stored, hence one more than there is room for.
            limit = min(params.max_tokens, self._capacity - len(tokens) + 1)
            # The tokens before decide whether the continuation of a text starts with a space.
            context = tokens[-8:] if isinstance(prompt, str) else ()
            requests.append(Request(tokens, params, limit, stop_tokens, context))
        return requests

    def _take_over(self) -> int:
        """Makes the KV pages ours; a stream that still used them is over."""
        self._run_number += 1
        self._runner.restore_kv()
        self._monitor.after_other(self._runner.take_reports())
        return self._run_number

    def _run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Piece]]:
        done = 0
        while done < len(requests):
            batch = self._next_batch(requests[done:])
            number = self._take_over()
            pieces = generate_batch(
                self._runner, batch, self.tokenizer, self._after_step, self._progress
            )
            for index, piece in pieces:
                yield done + index, piece
                if number != self._run_number and piece.finish_reason is None:
                    raise RuntimeError(
                        "this stream is over: the engine was used for something else before "
                        "the stream had ended; read a stream to its end first"
                    )
            done += len(batch)

    def _step_to_show(self) -> tuple[StepReport, Residency]:
        if self._last_step is None:
            raise ValueError("there is no step to show yet; generate something first")
        return self._last_step

    def _after_step(self, step: StepTime) -> None:
        reports = self._runner.take_reports()
        self._monitor.after_step(step, reports)
        self._last_step = reports[-1], self._mover.residency
        self._mover.after_step(reports, step.prompt_tokens)

    def _next_batch(self, requests: Sequence[Request]) -> Sequence[Request]:
        """As many of the first requests as there are seats and KV for."""
        used = 0
        for count, request in enumerate(requests):
            used += len(request.prompt) + request.limit - 1
            if count and (used > self._capacity or count >= self._max_seqs):
                return requests[:count]
        return requests


def _join(pieces: Sequence[Piece]) -> Completion:
    reason = pieces[-1].finish_reason
    assert reason is not None, "a sequence ended without a reason"
    return Completion(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(piece.token for piece in pieces),
        logprobs=tuple(piece.logprob for piece in pieces),
        finish_reason=reason,
    )
