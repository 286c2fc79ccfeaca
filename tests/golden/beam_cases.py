"""Drawn beam searches, how Transformers answers them, and how the pieces of moe_jax do.

Not a test. `run_pieces` takes the logits from any model, on the whole text of every beam, so that
the algorithm is compared and nothing else. Needs torch and transformers.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from moe_jax import Engine
from moe_jax.decoding.beam_candidates import (
    beam_candidates,
    by_request,
    stack_beams,
)
from moe_jax.decoding.beam_search import BeamOptions, Hypothesis, advance, results, start

NEAR = 1e-5  # rounding may order candidates this close either way
LENGTHS = (1, 2, 3, 5, 9, 17, 30)
MOST_BEAMS = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt and the wishes of a beam search, in the words of Transformers."""

    prompt: tuple[int, ...]
    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    eos: tuple[int, ...]
    min_new_tokens: int
    max_new_tokens: int
    repetition_penalty: float

    @property
    def options(self) -> BeamOptions:
        return BeamOptions(
            num_beams=self.num_beams,
            limit=self.max_new_tokens,
            num_return=self.num_return_sequences,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            eos=frozenset(self.eos),
            min_tokens=self.min_new_tokens,
            repetition_penalty=self.repetition_penalty,
        )


def draw_cases(model: PreTrainedModel, count: int, seed: int, longest: int = 24) -> list[Case]:
    """Cases over the whole grid, more of them where the options matter: few beams, many tokens.

    Every combination of length penalty, early stopping and number of eos ids comes up once in 60.
    """
    random = np.random.default_rng(seed)
    grid = itertools.product((-1.0, 0.0, 0.5, 1.0, 2.0), (True, False, "never"), range(4))
    cells = list(itertools.islice(itertools.cycle(grid), count))
    random.shuffle(cells)
    cases = []
    for length_penalty, early_stopping, eos_ids in cells:
        prompt = random.integers(2, model.config.vocab_size, random.choice(LENGTHS)).tolist()
        beams = int(random.integers(1, random.choice([5, MOST_BEAMS + 1])))
        limit = int(random.integers(random.choice([1, longest // 2]), longest + 1))
        least = int(random.integers(0, min(limit, 6) + 1))
        cases.append(
            Case(
                prompt=tuple(prompt),
                num_beams=beams,
                num_return_sequences=int(random.integers(random.choice([1, beams]), beams + 1)),
                length_penalty=float(length_penalty),
                early_stopping=early_stopping,
                eos=tuple(random.permutation(liked_tokens(model, prompt))[:eos_ids].tolist()),
                min_new_tokens=int(random.choice([0, 0, least])),
                max_new_tokens=limit,
                # Alone, one beam is greedy decoding, where the penalty acts on logits.
                repetition_penalty=float(random.choice([1.0, 1.0, 0.8, 1.3])) if beams > 1 else 1.0,
            )
        )
    return cases


def liked_tokens(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """The five commonest tokens of a beam search without an end: as eos ids they come often."""
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=8,
        num_beams=6,
        num_return_sequences=6,
        do_sample=False,
    )
    counts = Counter(found[:, len(prompt) :].flatten().tolist())
    return [token for token, _ in counts.most_common(5)]


def run_transformers(model: PreTrainedModel, case: Case) -> list[Hypothesis]:
    """The hypotheses of `generate`, its padding taken off; scores are NaN where it gives none."""
    pad = model.config.vocab_size - 1
    found = model.generate(
        torch.tensor([case.prompt]),
        attention_mask=torch.ones(1, len(case.prompt), dtype=torch.long),
        do_sample=False,
        num_beams=case.num_beams,
        num_return_sequences=case.num_return_sequences,
        length_penalty=case.length_penalty,
        early_stopping=case.early_stopping,
        eos_token_id=list(case.eos) or None,
        pad_token_id=pad,
        min_new_tokens=case.min_new_tokens,
        max_new_tokens=case.max_new_tokens,
        repetition_penalty=case.repetition_penalty,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = found.sequences_scores.tolist() if case.num_beams > 1 else [np.nan]
    texts = found.sequences[:, len(case.prompt) :].tolist()
    return [
        Hypothesis(_until_end(text, case.eos), score)
        for text, score in zip(texts, scores, strict=True)
    ]


def run_pieces(
    last_logits: Callable[[np.ndarray], np.ndarray], case: Case, vocab: int
) -> tuple[list[Hypothesis], float]:
    """The hypotheses, and the smallest difference between neighbouring candidates of any step.

    The beams change their places among more rows after each step.

    Args:
      last_logits: of token lists of one length, those that follow the last token.
    """
    random = np.random.default_rng(0)
    options = case.options
    state = start(options)
    rows = 2 * MOST_BEAMS
    row = np.zeros(options.num_beams, np.int32)  # the prompt runs once
    smallest, over = np.inf, False
    while not over:
        prompts = np.tile(np.array(case.prompt, np.int32), (options.num_beams, 1))
        texts = np.concatenate([prompts, state.tokens], axis=1)
        logits = np.full((rows, vocab), np.nan, np.float32)  # other rows must not be read
        logits[row] = last_logits(texts) if state.tokens.size else last_logits(texts[:1])
        seen = np.zeros((rows, vocab), bool)
        seen[row[:, None], texts] = True
        batch = stack_beams([state], [options], [row])
        candidates = by_request(beam_candidates(logits, batch, seen))[0]
        gaps = -np.diff(candidates.score[candidates.score > -np.inf])
        smallest = min(smallest, gaps.min(initial=np.inf))
        state, _, _, over = advance(state, candidates, options)
        row = random.permutation(rows)[: options.num_beams].astype(np.int32)
    return results(state, options), smallest


def run_engine(engine: Engine, cases: Sequence[Case]) -> list[list[Hypothesis]]:
    """The hypotheses of each case, all of them running together; scores are NaN without beams."""
    handles = []
    for case in cases:
        options: dict[str, Any] = {}
        if case.num_beams > 1:
            options = {
                "num_beams": case.num_beams,
                "num_return": case.num_return_sequences,
                "length_penalty": case.length_penalty,
                "early_stopping": case.early_stopping,
            }
        engine.stop_tokens = frozenset(case.eos)  # a model has its own; here every case has
        handle = engine.submit(
            list(case.prompt),
            max_tokens=case.max_new_tokens,
            min_tokens=case.min_new_tokens,
            repetition_penalty=case.repetition_penalty,
            **options,
        )
        handles.append(handle)
    found = [handle.result() for handle in handles]
    return [
        [Hypothesis(text.tokens, np.nan if text.score is None else text.score) for text in texts]
        for texts in (one if isinstance(one, list) else [one] for one in found)
    ]


def differences(
    actual: Sequence[Hypothesis], expected: Sequence[Hypothesis], case: Case
) -> list[str]:
    """What is not equal: tokens, order, or scores by more than 1e-4.

    A negative length_penalty multiplies the log-probability of a text by a power of its length;
    there the log-probability is compared.
    """
    if [text.tokens for text in actual] != [text.tokens for text in expected]:
        return [f"{case}: {actual}, expected {expected}"]
    wrong = []
    for ours, theirs in zip(actual, expected, strict=True):
        limit = 1e-4 * max(1, len(theirs.tokens) ** -case.length_penalty)
        if abs(ours.score - theirs.score) > limit:
            wrong.append(f"{case}: score {ours.score}, expected {theirs.score}")
    return wrong


def _until_end(text: Sequence[int], eos: Sequence[int]) -> tuple[int, ...]:
    ends = [place + 1 for place, token in enumerate(text) if token in eos]
    return tuple(text[: min(ends)] if ends else text)
