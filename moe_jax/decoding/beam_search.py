"""Beam search of one request: its state, and what the candidates of a step make of it.

The definition is that of `generate(num_beams=...)` of transformers 5, for one request. Knows no
model, device or page: candidates come from `moe_jax.decoding.beam_candidates`, and whoever keeps
the KV of the beams learns from `advance` which beam each of them continues.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

# What an unfilled place among the finished is worth, where a search asks if it can still improve.
UNFILLED = -1e9


@dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """The wishes of one request, checked where they came from (SamplingParams).

    Attributes:
      num_beams: beams that run at a time, and finished texts that are kept.
      limit: new tokens at most.
      num_return: results, at most num_beams.
      length_penalty: a finished text is worth its log-probability / its tokens ** length_penalty.
      early_stopping: True: stop when num_beams texts have finished. False: when the best beam, were
        it to end now, would be worth no more than the worst finished text. "never": as False, but
        with a length_penalty above 0 were it to end at the limit.
      eos: ids that end a text.
      min_tokens: new tokens before an eos may be chosen.
      repetition_penalty: above 1, tokens of the prompt and of the beam become less likely. It acts
        on log-probabilities here, and on logits where no beams are searched.
    """

    num_beams: int
    limit: int
    num_return: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    eos: frozenset[int] = frozenset()
    min_tokens: int = 0
    repetition_penalty: float = 1.0


class Hypothesis(NamedTuple):
    """A text and its worth: log-probability / tokens ** length_penalty.

    The tokens include the eos that ended it.
    """

    tokens: tuple[int, ...]
    score: float


class Candidates(NamedTuple):
    """The best continuations of all beams by one token, best first.

    Attributes:
      score: log-probability of beam and token together; -inf: there is no such candidate.
      beam: which beam it continues.
      token: with what.
    """

    score: Float32[np.ndarray, " candidates"]
    beam: Int32[np.ndarray, " candidates"]
    token: Int32[np.ndarray, " candidates"]


@dataclass(frozen=True)
class BeamState:
    """The beams after some steps.

    Attributes:
      scores: the log-probability of each beam, best first; -inf: there is no such beam.
      tokens: what each has generated.
      finished: the best texts that have ended, best first, at most num_beams.
    """

    scores: Float32[np.ndarray, " beams"]
    tokens: Int32[np.ndarray, "beams generated"]
    finished: tuple[Hypothesis, ...] = ()


def start(options: BeamOptions) -> BeamState:
    """After the prompt only the first beam exists: the others would repeat it."""
    scores = np.full(options.num_beams, -np.inf, np.float32)
    scores[0] = 0
    return BeamState(scores, np.zeros((options.num_beams, 0), np.int32))


def advance(
    state: BeamState, candidates: Candidates, options: BeamOptions
) -> tuple[BeamState, Int32[np.ndarray, " beams"], Int32[np.ndarray, " beams"], bool]:
    """One step of the search.

    A candidate has ended if its token is an eos or its length the limit. Of the num_beams best
    candidates those that have ended join the finished; the best others run on, of which there are
    num_beams unless the vocabulary is very small.

    Returns:
      The new state; which former beam each beam continues, and with what token; whether the search
      is over. A beam that does not exist repeats the best one.

    Raises:
      ValueError: a score is NaN.
    """
    if np.isnan(candidates.score).any():
        raise ValueError(
            f"the model computed NaN or infinite logits for new token {state.tokens.shape[1]} of a "
            "beam search; check the checkpoint, or load it with dtype='float32'"
        )
    length = state.tokens.shape[1] + 1
    exists = candidates.score > -np.inf
    ended = np.isin(candidates.token, list(options.eos)) | (length >= options.limit)
    finished = _join(state, candidates, exists & ended, options)

    going = np.flatnonzero(exists & ~ended)[: options.num_beams]
    chosen = np.full(options.num_beams, going[0] if len(going) else 0)
    chosen[: len(going)] = going
    parent, token = candidates.beam[chosen], candidates.token[chosen]
    scores = candidates.score[chosen]
    scores[len(going) :] = -np.inf

    tokens = np.concatenate([state.tokens[parent], token[:, None]], axis=1)
    advanced = BeamState(scores, tokens, finished)
    return advanced, parent, token, _is_over(advanced, options)


def results(state: BeamState, options: BeamOptions) -> list[Hypothesis]:
    """The best num_return texts: the finished ones, best first, then beams that still run.

    Beams that run are needed only where a search was cut short, or where a very negative
    length_penalty ended it (transformers returns empty texts there). There are fewer than
    num_return where the vocabulary has no more continuations.
    """
    length = max(state.tokens.shape[1], 1)
    running = [
        Hypothesis(tuple(tokens), _worth(score, length, options))
        for score, tokens in zip(state.scores, state.tokens.tolist(), strict=True)
        if score > -np.inf
    ]
    return [*state.finished, *running][: options.num_return]


def _join(
    state: BeamState,
    candidates: Candidates,
    ended: Bool[np.ndarray, " candidates"],
    options: BeamOptions,
) -> tuple[Hypothesis, ...]:
    """The finished texts with those of the best candidates that have ended; older before equal."""
    length = state.tokens.shape[1] + 1
    finished = list(state.finished)
    for rank in np.flatnonzero(ended[: options.num_beams]):
        before = state.tokens[candidates.beam[rank]].tolist()
        worth = _worth(candidates.score[rank], length, options)
        finished.append(Hypothesis((*before, int(candidates.token[rank])), worth))
    finished.sort(key=lambda text: -text.score)
    return tuple(finished[: options.num_beams])


def _is_over(state: BeamState, options: BeamOptions) -> bool:
    full = len(state.finished) == options.num_beams
    # One beam that goes on past its eos would not be greedy decoding.
    if full and (options.early_stopping is True or options.num_beams == 1):
        return True
    hopeful = options.early_stopping == "never" and options.length_penalty > 0
    length = options.limit if hopeful else state.tokens.shape[1]
    worst = state.finished[-1].score if full else UNFILLED
    return not _worth(state.scores[0], length, options) > worst


def _worth(score: np.float32, length: int, options: BeamOptions) -> float:
    return float(score) / float(length) ** options.length_penalty
