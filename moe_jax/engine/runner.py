"""Runs steps: packs sequences' new tokens into buckets and calls the programs layer by layer.

Knows weights, KV pages and programs; not requests, text or sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from host_offload.interrupts import hold_interrupts
from host_offload.threads import give_way
from moe_jax.cache.page_pool import PageCopies
from moe_jax.cache.paged_kv import allocate_kv, copy_pages
from moe_jax.config import ModelConfig
from moe_jax.engine.swap import swap_experts
from moe_jax.model.compiled import ServedLayer
from moe_jax.model.programs import Programs
from moe_jax.model.step import StepInputs
from moe_jax.model.tally import Tally
from moe_jax.placement.curves import CostCurves

PREFILL_BUCKETS = (32, 128, 512)
# New tokens of a sequence in a step that verifies drafts: its last token and what was guessed.
VERIFY_TOKENS = 8


@dataclass(frozen=True)
class ServedModel:
    """A model in memory, ready to run."""

    config: ModelConfig
    embedding: Float[Array, "vocab embed"]
    layers: tuple[ServedLayer, ...]
    final_norm: Float[Array, " embed"]
    unembedding: Float[Array, "vocab embed"]
    curves: CostCurves
    dtype: jnp.dtype


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


@dataclass(frozen=True)
class StepReport:
    """One step that ran.

    Attributes:
      tokens: rows of its bucket.
      max_query_length: 1 in decode.
      compiled: whether a program was compiled for it.
      tally: what its layers did.
    """

    tokens: int
    max_query_length: int
    compiled: bool
    tally: Tally

    def read(self) -> "StepReport":
        """This report in numpy; waits until the step is done."""
        return replace(self, tally=replace(self.tally, rows=np.asarray(self.tally.rows)))


class Runner:
    """Executes steps of one model over its own KV pages."""

    def __init__(self, model: ServedModel, programs: Programs, pages: int, max_seqs: int):
        self.model = model
        self.programs = programs
        self.pages = pages
        self._seqs = bucket_of(max_seqs)
        self._kv = allocate_kv(model.config, pages, model.dtype)
        self._unread: list[StepReport] = []
        # Whether a step was begun and has not ended; only then can donated pages be lost.
        self._unfinished = False

    def restore_kv(self) -> bool:
        """Allocates anew what an interrupted step donated and did not give back.

        Returns whether it had to: what the pages held is lost then.
        """
        if not self._unfinished:
            return False
        lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(self._kv))
        if lost:
            self._kv = allocate_kv(self.model.config, self.pages, self.model.dtype)
        self._unfinished = False
        return lost

    def copy_pages(self, copies: PageCopies) -> None:
        """Copies whole pages in every layer, before a sequence writes into its own copy."""
        self._unfinished = True
        self._kv = copy_pages(self._kv, copies)
        self._unfinished = False

    def take_reports(self) -> list[StepReport]:
        """Those of the steps since the last call, done or not."""
        reports, self._unread = self._unread, []
        return reports

    def swap(self, layer: int, incoming: int, outgoing: int) -> None:
        """Makes one expert of a layer resident in the place of another.

        An interrupt is delivered when both are where they belong.

        Raises ValueError if one of them is not where it must be.
        """
        served = self.model.layers[layer]
        if served.experts is None:
            raise ValueError(f"layer {layer} is dense: it has no experts to swap")
        with hold_interrupts():
            swapped = replace(served, experts=swap_experts(served.experts, incoming, outgoing))
            layers = (*self.model.layers[:layer], swapped, *self.model.layers[layer + 1 :])
            self.model = replace(self.model, layers=layers)

    def step(
        self,
        batch: Sequence[NewTokens],
        wanted: Sequence[int],
        sampled: Int[Array, " rows"] | None = None,
    ) -> Float[Array, "rows vocab"]:
        """Runs the new tokens of several sequences together.

        `wanted` are places in the batch's tokens laid end to end; the first len(wanted) rows of
        the result are the logits after them. Shapes are few: one new token per sequence (decode),
        at most VERIFY_TOKENS, or a prefill bucket over all of them. `sampled` stands for the tokens
        of the batch, one for each sequence, where a program has still to find them: as many as the
        rows of logits that they are sampled from.
        """
        longest = max(len(new.tokens) for new in batch)
        total = sum(len(new.tokens) for new in batch)
        seqs = bucket_of(len(batch))
        if longest == 1:
            x = self._run(batch, seqs, seqs, 1, sampled)
            rows = seqs
        elif all(new.verify or len(new.tokens) == 1 for new in batch):
            x = self._run(batch, seqs * VERIFY_TOKENS, seqs, VERIFY_TOKENS)
            rows = seqs * VERIFY_TOKENS
        else:
            bucket = next(size for size in PREFILL_BUCKETS if size >= total)
            x = self._run(batch, bucket, self._seqs, bucket)
            rows = self._seqs if len(wanted) <= self._seqs else self._seqs * VERIFY_TOKENS
        places = np.zeros(rows, np.int32)
        places[: len(wanted)] = wanted
        return self._logits(x, places)

    def all_logits(self, new: NewTokens) -> Float[np.ndarray, "tokens vocab"]:
        """Adds any number of tokens of one sequence; returns the logits after each of them."""
        parts = []
        for x, used in self._chunks(new):
            logits = self._logits(x, np.arange(x.shape[0], dtype=np.int32))
            parts.append(np.asarray(logits)[:used])
        return np.concatenate(parts)

    def decoded_logits(self, new: NewTokens) -> Float[np.ndarray, "tokens vocab"]:
        """As `all_logits`, but one token after the other, as in decoding."""
        parts = []
        for place, token in enumerate(new.tokens):
            one = replace(new, tokens=[token], cached=new.cached + place)
            parts.append(np.asarray(self.step([one], [0]))[:1])
        return np.concatenate(parts)

    def _chunks(self, new: NewTokens):
        """Yields the activations of each chunk and how many of its rows are tokens."""
        for start in range(0, len(new.tokens), PREFILL_BUCKETS[-1]):
            tokens = new.tokens[start : start + PREFILL_BUCKETS[-1]]
            bucket = next(size for size in PREFILL_BUCKETS if size >= len(tokens))
            chunk = NewTokens(tokens, new.cached + start, new.length, new.pages)
            yield self._run([chunk], bucket, self._seqs, bucket), len(tokens)

    def _run(
        self,
        batch: Sequence[NewTokens],
        tokens: int,
        seqs: int,
        max_query_length: int,
        sampled: Int[Array, " tokens"] | None = None,
    ) -> Float[Array, "tokens embed"]:
        model = self.model
        self._unfinished = True
        traced = self.programs.traces.total()
        step = pack_step(batch, tokens, seqs)
        if sampled is not None:
            step = replace(step, tokens=sampled)
        give_way()
        x, state, tally = self.programs.embed(model.embedding, step)
        following = (*model.layers[1:], None)
        for i, layer in enumerate(model.layers):
            give_way()
            x, self._kv[i], tally = layer.program(
                layer, self._kv[i], x, state, model.curves, tally, max_query_length, following[i]
            )
        self._unfinished = False
        compiled = self.programs.traces.total() > traced
        self._unread.append(StepReport(tokens, max_query_length, compiled, tally))
        return x

    def _logits(self, x, rows):
        return self.programs.head(self.model.final_norm, self.model.unembedding, x, rows)


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
