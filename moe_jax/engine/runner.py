"""Runs steps: packs sequences' new tokens into buckets and calls the programs layer by layer.

Knows weights, KV pages and programs; not requests, text or sampling.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from host_offload.interrupts import hold_interrupts
from host_offload.threads import give_way
from moe_jax.cache.page_pool import PageCopies
from moe_jax.cache.paged_kv import allocate_kv, copy_pages
from moe_jax.config import ModelConfig
from moe_jax.engine.batch import (
    PREFILL_BUCKETS,
    NewTokens,
    bucket_of,
    decode_shape,
    last_tokens,
    pack_step,
    padded,
)
from moe_jax.engine.swap import swap_experts
from moe_jax.model.compiled import ServedLayer
from moe_jax.model.programs import Programs
from moe_jax.model.step import StepState
from moe_jax.model.tally import Tally
from moe_jax.placement.curves import CostCurves


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

    def __init__(
        self,
        model: ServedModel,
        programs: Programs,
        pages: int,
        max_seqs: int,
        *,
        whole_prompts: bool,
    ):
        """With `whole_prompts` the last layer, too, runs all tokens of a prompt, and reports them.

        No result needs it, but who learns from the reports which experts are used may.
        """
        self.model = model
        self.programs = programs
        self.pages = pages
        # Called before a program is started, as often as it pays to give way.
        self.before_program: Callable[[], None] = give_way
        self._whole_prompts = whole_prompts
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

        Raises ValueError if one of them is not where it must be, and what JAX raises if memory runs
        out; both are then where they were.
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

        `wanted` are places in the batch's tokens laid end to end, rising, for each sequence the
        last ones of its tokens or none; the first len(wanted) rows of the result are the logits
        after them. Shapes are few: one new token per sequence (decode), at most VERIFY_TOKENS, or a
        prefill bucket over all of them; then the last layer is run for the wanted ones alone,
        unless prompts are to be run whole. `sampled` stands for the tokens of the batch, one for
        each sequence, where a program has still to find them: as many as the rows of logits that
        they are sampled from.
        """
        if any(len(new.tokens) > 1 and not new.verify for new in batch):
            return self._prefill(batch, wanted)
        rows, seqs, longest = decode_shape(batch)
        x = self._run(batch, rows, seqs, longest, sampled)
        return self._logits(x, padded(wanted, rows))

    def all_logits(self, new: NewTokens) -> Float[np.ndarray, "tokens vocab"]:
        """Adds any number of tokens of one sequence; returns the logits after each of them."""
        parts = []
        for x, used in self.whole_chunks(new):
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

    def whole_chunks(self, new: NewTokens) -> Iterator[tuple[Float[Array, "bucket embed"], int]]:
        """Adds any number of tokens of one sequence, all of them in every layer.

        Yields the activations of each chunk and how many of its rows are tokens.
        """
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
        """Runs a step through all layers."""
        traced = self._begin()
        step = pack_step(batch, tokens, seqs)
        if sampled is not None:
            step = replace(step, tokens=sampled)
        self.before_program()
        x, state, tally = self.programs.embed(self.model.embedding, step)
        x, tally = self._layers(x, state, tally, max_query_length)
        self._end(traced, tokens, max_query_length, tally)
        return x

    def _prefill(
        self, batch: Sequence[NewTokens], wanted: Sequence[int]
    ) -> Float[Array, "rows vocab"]:
        """Runs a step with tokens of prompts; the logits of those wanted, in the rows of decode."""
        total = sum(len(new.tokens) for new in batch)
        bucket = next(size for size in PREFILL_BUCKETS if size >= total)
        last = last_tokens(batch, wanted)
        if self._whole_prompts:
            x, places = self._run(batch, bucket, self._seqs, bucket), wanted
        else:
            x, places = self._run_narrowing(batch, bucket, last, wanted), range(len(wanted))
        if not last:
            return jnp.zeros((0, self.model.config.vocab), jnp.float32)
        return self._logits(x, padded(places, decode_shape(last)[0]))

    def _run_narrowing(
        self,
        batch: Sequence[NewTokens],
        bucket: int,
        last: Sequence[NewTokens],
        wanted: Sequence[int],
    ) -> Float[Array, "rows embed"]:
        """Runs a step in whose last layer all tokens leave their keys and values and no more.

        The wanted ones, if any, go on in the shapes of decode.
        """
        programs, layer = self.programs, self.model.layers[-1]
        traced = self._begin()
        step = pack_step(batch, bucket, self._seqs)
        self.before_program()
        x, state, tally = programs.embed(self.model.embedding, step)
        x, tally = self._layers(x, state, tally, bucket, slice(-1))
        self.before_program()
        self._kv[-1] = layer.program.extend_kv(layer, self._kv[-1], x, state)
        if last:
            rows, seqs, longest = decode_shape(last)
            x, state = programs.narrow(x, pack_step(last, rows, seqs), padded(wanted, rows))
            x, tally = self._layers(x, state, tally, longest, slice(-1, None))
        self._end(traced, bucket, bucket, tally)
        return x

    def _begin(self) -> int:
        """Begins a step; returns how often programs had been traced by then."""
        self._unfinished = True
        return self.programs.traces.total()

    def _end(self, traced: int, tokens: int, max_query_length: int, tally: Tally) -> None:
        """A step has been started to its end."""
        self._unfinished = False
        compiled = self.programs.traces.total() > traced
        self._unread.append(StepReport(tokens, max_query_length, compiled, tally))

    def _layers(
        self,
        x: Float[Array, "tokens embed"],
        state: StepState,
        tally: Tally,
        max_query_length: int,
        which: slice = slice(None),
    ) -> tuple[Float[Array, "tokens embed"], Tally]:
        """Runs some of the layers, one after the other."""
        layers = list(enumerate(self.model.layers))[which]
        for (i, layer), following in zip_longest(layers, layers[1:]):
            after = following and following[1]
            self.before_program()
            x, self._kv[i], tally = layer.program(
                layer, self._kv[i], x, state, self.model.curves, tally, max_query_length, after
            )
        return x, tally

    def _logits(self, x, rows):
        return self.programs.head(self.model.final_norm, self.model.unembedding, x, rows)
