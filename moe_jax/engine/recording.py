"""Records which experts the tokens of a text are routed to.

Knows the runner; what is done with a trace is the simulator's business.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from moe_jax.engine.runner import PREFILL_BUCKETS, NewTokens, Runner
from moe_jax.placement.trace import RoutingTrace, make_trace


def record_routing(
    runner: Runner,
    tokens: Sequence[int],
    prompt_tokens: int,
    pages: Int[np.ndarray, " pages_per_seq"],
) -> RoutingTrace:
    """Prefills the first tokens, then feeds the others one by one, as decoding would.

    Returns a trace of the layers with experts: one step for every chunk of the prompt, one for
    every token after it.
    """
    chunk = PREFILL_BUCKETS[-1]
    starts = [*range(0, prompt_tokens, chunk), *range(prompt_tokens, len(tokens))]
    runner.take_reports()
    for start, end in pairwise([*starts, len(tokens)]):
        runner.step([NewTokens(tokens[start:end], start, len(tokens), pages)], [end - start - 1])
    reports = [report.read() for report in runner.take_reports()]
    prefill = [start < prompt_tokens for start in starts]
    config = runner.model.config
    layers = np.flatnonzero(config.moe_layers)
    whole = np.s_[layers, :: config.moe.pieces]  # an expert's pieces all report the same
    return make_trace(
        np.stack([report.tally.counts[whole] for report in reports]),
        config.moe.routed_per_token,
        gates=np.stack([report.tally.gates[whole] for report in reports]),
        prefill=np.asarray(prefill),
        layer=layers,
    )
