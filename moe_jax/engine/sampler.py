"""Draws the next tokens of the texts of a step, in one call for all of them.

Keeps what outlives a step: the options of a batch and the counts of its texts. Knows no scheduling
and no pages; mathematics is in `moe_jax.decoding`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float

from host_offload.threads import give_way
from moe_jax.decoding.allowed_tokens import allowed_mask, stack_masks
from moe_jax.decoding.prompt_lookup import accept
from moe_jax.decoding.sampling import Sampled, sample, sample_greedy
from moe_jax.decoding.sampling_options import SamplingOptions, stack_options, top_width
from moe_jax.decoding.sampling_params import SamplingParams
from moe_jax.decoding.text_counts import TextCounts, empty_text_counts, pad_tokens, set_row
from moe_jax.engine.continuation import Continuation, Drawn

_PADDING = SamplingParams()


@dataclass(frozen=True)
class Draw:
    """Tokens that are being sampled.

    Attributes:
      places: which rows of the logits are whose.
      sampled: one token for each row.
      errors: of requests that no token can be sampled for.
    """

    places: dict[Continuation, list[int]]
    sampled: Sampled
    errors: dict[Continuation, ValueError]

    @property
    def done(self) -> bool:
        """Whether the tokens are there."""
        token: Any = self.sampled.token  # jax does not declare the method
        return token.is_ready()


class Sampler:
    """Samples for the continuations of one engine."""

    def __init__(self, vocab: int, rows: int):
        """`rows` of KV pages: a continuation's row is where its tokens are counted."""
        self._vocab = vocab
        self._rows = rows
        self._counts: TextCounts | None = None
        # Whose text each row counts, and how often it had been stopped when it was counted.
        self._counted: dict[int, tuple[Continuation, int]] = {}
        self._stacked: tuple[tuple[object, ...], SamplingOptions] | None = None

    def sample(
        self, places: dict[Continuation, list[int]], logits: Float[Array, "rows vocab"]
    ) -> Draw:
        """Samples the tokens that follow each text, whose logits are at these places.

        Waits for nothing: `read` does.
        """
        order: list[Continuation | None] = [None] * logits.shape[0]
        for continuation, own in places.items():
            for place in own:
                order[place] = continuation
        params = [_PADDING if one is None else one.request.params for one in order]
        top = top_width(params, self._vocab)
        errors: dict[Continuation, ValueError] = {}
        if all(one.plain_greedy for one in params):
            sampled = sample_greedy(logits, top=top)
        else:
            sampled = self._sample(order, params, logits, top, errors)
        return Draw(places, sampled, errors)

    def read(self, draw: Draw) -> dict[Continuation, list[Drawn] | ValueError]:
        """What was sampled for each text.

        Of guesses, those that hold come with the token after them. A request whose logits are not
        numbers, or that allows no token, gets its error instead.
        """
        sampled = draw.sampled
        token, logprob = np.asarray(sampled.token), np.asarray(sampled.logprob)
        give_way()  # what was started ahead can go on now, too

        def drawn(continuation: Continuation, place: int) -> Drawn:
            likeliest = ()
            if wanted := continuation.request.params.logprobs:
                tokens = np.asarray(sampled.top_tokens)[place, :wanted].tolist()
                logprobs = np.asarray(sampled.top_logprobs)[place, :wanted].tolist()
                likeliest = tuple(zip(tokens, logprobs, strict=True))
            return Drawn(int(token[place]), float(logprob[place]), likeliest)

        result: dict[Continuation, list[Drawn] | ValueError] = dict(draw.errors)
        for continuation, own in draw.places.items():
            if continuation in draw.errors:
                continue
            held = accept(continuation.draft, token[own])
            own = own[: held + 1]
            result[continuation] = (
                _not_a_number(continuation)
                if any(math.isnan(logprob[place]) for place in own)
                else [drawn(continuation, place) for place in own]
            )
        return result

    def clear(self) -> None:
        """Forgets what an interrupted step may have left half done."""
        self._counts, self._stacked = None, None
        self._counted.clear()

    def _sample(
        self,
        order: Sequence[Continuation | None],
        params: Sequence[SamplingParams],
        logits: Float[Array, "rows vocab"],
        top: int,
        errors: dict[Continuation, ValueError],
    ) -> Sampled:
        size = len(order)
        position, new = np.zeros(size, np.int32), np.zeros(size, np.int32)
        row = np.full(size, self._rows, np.int32)
        masks: list[Bool[np.ndarray, " vocab"] | None] = [None] * size
        for place, one in enumerate(order):
            if one is None:
                continue
            position[place], new[place] = len(one.tokens), one.new_tokens
            if one.request.params.counts_tokens:
                row[place] = one.rows[0]
                self._count(one)
            if one.request.params.allowed_tokens is not None:
                try:
                    masks[place] = self._ask(one)
                except ValueError as error:
                    errors[one] = error
        options = self._options(order, params)
        allowed = stack_masks(masks, self._vocab)
        counts = self._counts if options.counts else None
        sampled, counts = sample(logits, options, position, counts, row, new, allowed, top=top)
        if counts is not None:
            self._counts = counts
        return sampled

    def _ask(self, one: Continuation) -> Bool[np.ndarray, " vocab"] | None:
        """The tokens that a request's own function allows next; None: all."""
        return allowed_mask(
            one.request.params,
            one.generated,
            one.request.stop_tokens,
            self._vocab,
            f"request {one.arrival}",
        )

    def _options(
        self, order: Sequence[Continuation | None], params: Sequence[SamplingParams]
    ) -> SamplingOptions:
        """The options of the batch, stacked anew only when the batch has changed."""
        key = tuple(order)
        if self._stacked is None or self._stacked[0] != key:
            stops = [frozenset() if one is None else one.request.stop_tokens for one in order]
            self._stacked = key, stack_options(params, stops, self._vocab)
        return self._stacked[1]

    def _count(self, continuation: Continuation) -> None:
        """Makes the counts of its row those of its text, unless they are."""
        if self._counts is None:
            self._counts = empty_text_counts(self._rows, self._vocab)
        (row,) = continuation.rows
        text = continuation, continuation.restarts
        if self._counted.get(row) == text:
            return
        prompt, generated = continuation.request.prompt, continuation.generated
        self._counts = set_row(
            self._counts,
            row,
            pad_tokens(prompt, self._vocab),
            pad_tokens(generated, self._vocab),
        )
        self._counted[row] = text


def _not_a_number(continuation: Continuation) -> ValueError:
    return ValueError(
        f"the model computed NaN or infinite logits for request {continuation.arrival} at "
        f"position {len(continuation.tokens)}; check the checkpoint, or load it with "
        "dtype='float32'"
    )
