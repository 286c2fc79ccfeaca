"""Records which experts the tokens of a text are routed to.

Knows the runner; what is done with a trace is the simulator's business.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from moe_jax.engine.batch import NewTokens
from moe_jax.engine.runner import Runner
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
    new = lambda start, end: NewTokens(tokens[start:end], start, len(tokens), pages)
    runner.take_reports()
    chunks = sum(1 for _ in runner.whole_chunks(new(0, prompt_tokens)))
    for start in range(prompt_tokens, len(tokens)):
        runner.step([new(start, start + 1)], [0])
    reports = [report.read() for report in runner.take_reports()]
    prefill = [step < chunks for step in range(len(reports))]
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
