"""Lays the new tokens of several sequences end to end, in one of a few shapes.

Knows tokens and pages; neither programs nor requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from moe_jax.model.step import StepInputs

PREFILL_BUCKETS = (32, 128, 512)
# New tokens of a sequence in a step that verifies drafts: its last token and what was guessed.
VERIFY_TOKENS = 8


@dataclass(frozen=True)
class NewTokens:
    """What one sequence adds in a step.

    Attributes:
      tokens: its new token ids.
      cached: how many of its tokens are in the pages already.
      length: the total length its rotary frequencies are chosen for.
      pages: its row of the block table.
      verify: whether all but the first of the tokens are guesses to verify.
    """

    tokens: Sequence[int]
    cached: int
    length: int
    pages: Int[np.ndarray, " pages_per_seq"]
    verify: bool = False


def pack_step(batch: Sequence[NewTokens], tokens: int, seqs: int) -> StepInputs:
    """Lays the sequences' new tokens end to end and pads to `tokens` rows and `seqs` sequences."""
    counts = [len(new.tokens) for new in batch]
    assert sum(counts) <= tokens and len(batch) <= seqs, (counts, tokens, seqs)
    flat = np.zeros(tokens, np.int32)
    flat[: sum(counts)] = np.concatenate([np.asarray(new.tokens, np.int32) for new in batch])
    starts = np.full(seqs + 1, sum(counts), np.int32)
    starts[: len(batch) + 1] = np.cumsum([0, *counts])
    kv_lengths, rope_lengths = np.zeros(seqs, np.int32), np.ones(seqs, np.int32)
    kv_lengths[: len(batch)] = [new.cached + len(new.tokens) for new in batch]
    rope_lengths[: len(batch)] = [new.length for new in batch]
    tables = np.zeros((seqs, batch[0].pages.size), np.int32)
    tables[: len(batch)] = [new.pages for new in batch]
    return StepInputs(flat, starts, kv_lengths, rope_lengths, tables)


def bucket_of(count: int) -> int:
    """The power of two that `count` is rounded up to."""
    return 1 << (count - 1).bit_length()


def decode_shape(batch: Sequence[NewTokens]) -> tuple[int, int, int]:
    """Rows, sequences and new tokens per sequence at most that such a batch is padded to."""
    seqs = bucket_of(len(batch))
    longest = 1 if all(len(new.tokens) == 1 for new in batch) else VERIFY_TOKENS
    return seqs * longest, seqs, longest


def last_tokens(batch: Sequence[NewTokens], wanted: Sequence[int]) -> list[NewTokens]:
    """Those tokens of a batch that are wanted, for each sequence its last ones or none."""
    ends = np.cumsum([len(new.tokens) for new in batch])
    counts = np.bincount(np.searchsorted(ends, wanted, side="right"), minlength=len(batch))
    found, places = [], []
    for new, end, count in zip(batch, ends.tolist(), counts.tolist(), strict=True):
        if count:
            left = len(new.tokens) - count
            found.append(replace(new, tokens=new.tokens[left:], cached=new.cached + left))
            places += range(end - count, end)
    assert places == list(wanted), (places, wanted)
    return found


def padded(wanted: Sequence[int], rows: int) -> Int[np.ndarray, " rows"]:
    """These places, and as many zeros as are missing."""
    places = np.zeros(rows, np.int32)
    places[: len(wanted)] = wanted
    return places
