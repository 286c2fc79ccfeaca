"""A request whose best texts a beam search finds: its beams, their rows, and what each holds.

Knows neither pages nor arrays of a model; the search itself is `moe_jax.decoding.beam_search`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Float

from moe_jax.cache.kv_rows import SharedPrefix
from moe_jax.cache.paged_kv import PAGE_SIZE
from moe_jax.decoding.beam_candidates import beam_candidates, by_request, stack_beams
from moe_jax.decoding.beam_search import (
    BeamOptions,
    BeamState,
    Candidates,
    Hypothesis,
    advance,
    results,
    start,
)
from moe_jax.decoding.stream_decoder import StreamDecoder
from moe_jax.engine.handle import Handle
from moe_jax.engine.outputs import Completion, FinishReason, Piece, Timing
from moe_jax.engine.request import Request
from moe_jax.engine.scheduler import Job

_Tokens = tuple[int, ...]


class BeamGroup(Job):
    """A request for the texts that a beam search finds.

    Its prompt is computed once, in its first row; then every beam has a row of its own. Its pages
    are set aside when it starts, and it is not stopped for others.

    Attributes:
      parent: which row each of its rows continues, as the last step found.
    """

    def __init__(
        self,
        request: Request,
        handle: Handle,
        *,
        exact_again: bool,
    ):
        """`exact_again`: whether the keys of its prompt are those that others compute."""
        params = request.params
        super().__init__(
            prompt=len(request.prompt),
            limit=len(request.prompt) + request.limit - 1,
            priority=params.priority,
            seats=params.num_beams,
            restartable=False,
        )
        self.request = request
        self.handle = handle
        self.rows: list[int] = []
        self.parent: dict[int, int] = {}
        self.options = BeamOptions(
            num_beams=params.num_beams,
            limit=request.limit,
            num_return=params.num_return,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            eos=request.stop_tokens,
            min_tokens=params.min_tokens,
            repetition_penalty=params.repetition_penalty,
        )
        self._sharing = exact_again
        self.stop()

    @property
    def tokens(self) -> _Tokens:
        """What all its rows hold in their full pages: the prompt."""
        return self.request.prompt

    def begin(self, rows: list[int], cached: int) -> None:
        """Starts with this many tokens in the pages of its first row."""
        self.rows, self.length = rows, cached
        self.todo = self.prompt - cached
        self.held = cached // PAGE_SIZE
        self.handle.began(cached)

    def stop(self) -> None:
        """Has lost its pages and begins anew."""
        self.rows, self.parent = [], {}
        self.length, self.todo, self.decoding, self.held = 0, self.prompt, False, 0
        self.prefix = SharedPrefix(self._sharing)
        self.state: BeamState = start(self.options)
        # What each token of a text added to its log-probability.
        self._logprobs: dict[_Tokens, tuple[float, ...]] = {(): ()}

    def inputs(self, count: int) -> list[tuple[int, list[int]]]:
        """The next tokens of each row that runs."""
        if not self.decoding:
            return [(self.rows[0], list(self.request.prompt[self.length : self.length + count]))]
        last = self.state.tokens[:, -1].tolist()
        return [(row, [token]) for row, token in zip(self.rows, last, strict=True)]

    def wrote(self, count: int) -> None:
        """The next `count` tokens of each row are in the pages now."""
        self.length += count
        self.todo -= count

    def seen(self) -> list[list[int]]:
        """The tokens of each beam, its prompt included."""
        return [[*self.request.prompt, *tokens] for tokens in self.state.tokens.tolist()]

    def accept(self, candidates: Candidates) -> bool:
        """Goes on with the best candidates; returns whether the search is over.

        Raises ValueError if the model's logits were not numbers.
        """
        before = self.state
        self.state, parent, _, over = advance(before, candidates, self.options)
        texts = [tuple(text) for text in before.tokens.tolist()]
        after: dict[_Tokens, tuple[float, ...]] = {}
        for text in (*before.finished, *self.state.finished):
            if text.tokens in self._logprobs:
                after[text.tokens] = self._logprobs[text.tokens]
        for beam, one, score in zip(
            candidates.beam, candidates.token, candidates.score, strict=True
        ):
            added = float(score) - float(before.scores[beam])
            after[(*texts[beam], int(one))] = (*self._logprobs[texts[beam]], added)
        self._logprobs = after
        self.handle.count_token()
        rows = self.rows if self.decoding else [self.rows[0]] * self.seats
        self.parent = {row: rows[one] for row, one in zip(self.rows, parent.tolist(), strict=True)}
        self.decoding, self.todo = True, 1
        return over

    def finish(self) -> None:
        """Hands its texts out."""
        found = results(self.state, self.options)
        texts = [self._text(one.tokens) for one in found]
        last = Piece(
            text=texts[0], token=None, logprob=0.0, finish_reason=self._reason(found[0].tokens)
        )
        self.handle.finish(
            last,
            lambda timing: tuple(
                self._completion(one, text, timing) for one, text in zip(found, texts, strict=True)
            ),
        )

    def cancel(self) -> None:
        """Ends it without a text."""
        last = Piece(text="", token=None, logprob=0.0, finish_reason="cancelled")
        nothing = Hypothesis((), 0.0)
        self.handle.finish(
            last, lambda timing: (self._completion(nothing, "", timing, "cancelled"),)
        )

    def _completion(
        self, found: Hypothesis, text: str, timing: Timing, reason: FinishReason | None = None
    ) -> Completion:
        return Completion(
            text=text,
            tokens=found.tokens,
            logprobs=self._logprobs.get(found.tokens, ()),
            finish_reason=reason or self._reason(found.tokens),
            score=found.score,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.handle.cached_tokens,
            timing=timing,
        )

    def _reason(self, tokens: _Tokens) -> FinishReason:
        return "stop" if tokens and tokens[-1] in self.options.eos else "length"

    def _text(self, tokens: _Tokens) -> str:
        if self.request.tokenizer is None:
            return ""
        decoder = StreamDecoder(self.request.tokenizer, self.request.context)
        shown = tokens[:-1] if self._reason(tokens) == "stop" else tokens
        return "".join([*(decoder.push(token) for token in shown), decoder.flush()])


def search(
    places: dict[BeamGroup, list[int]], logits: Float[Array, "rows vocab"]
) -> dict[BeamGroup, Candidates]:
    """The best candidates of each group, whose beams' logits are at these places."""
    if not places:
        return {}
    groups = list(places)
    rows = [own * group.seats if len(own) == 1 else own for group, own in places.items()]
    batch = stack_beams([g.state for g in groups], [g.options for g in groups], rows)
    found = beam_candidates(logits, batch, _seen(groups, rows, logits.shape))
    return dict(zip(groups, by_request(found), strict=False))


def _seen(
    groups: Sequence[BeamGroup], rows: Sequence[Sequence[int]], shape: tuple[int, ...]
) -> Bool[np.ndarray, "rows vocab"] | None:
    """Which tokens the text of each row holds, where a repetition penalty asks for it."""
    if all(group.options.repetition_penalty == 1 for group in groups):
        return None
    seen = np.zeros(shape, bool)
    for group, own in zip(groups, rows, strict=True):
        for row, tokens in zip(own, group.seen(), strict=True):
            seen[row, tokens] = True
    return seen
