"""Records which experts the tokens of a text are routed to.

Knows the runner; what is done with a trace is the simulator's business.
"""

from collections.abc import Sequence

import numpy as np

from moe_jax.cache.paged_kv import assign_pages
from moe_jax.engine.runner import NewTokens, Runner
from moe_jax.placement.trace import RoutingTrace, make_trace


def record_routing(runner: Runner, tokens: Sequence[int], prompt_tokens: int) -> RoutingTrace:
    """Prefills the first tokens, then feeds the others one by one, as decoding would.

    Returns a trace of the layers with experts: one step for every chunk of the prompt, one for
    every token after it.
    """
    (pages,) = assign_pages([len(tokens)], runner.pages)
    runner.take_reports()
    if prompt_tokens:
        runner.prefill(NewTokens(tokens[:prompt_tokens], 0, len(tokens), pages))
    reports = runner.take_reports()
    prefill = [True] * len(reports)
    for position in range(prompt_tokens, len(tokens)):
        new = NewTokens([tokens[position]], position, len(tokens), pages)
        runner.decode([new], 1)
        reports += runner.take_reports()
        prefill.append(False)
    config = runner.model.config
    layers = np.flatnonzero(config.moe_layers)
    return make_trace(
        np.stack([report.tally.counts[layers] for report in reports]),
        config.moe.experts_per_token,
        gates=np.stack([report.tally.gates[layers] for report in reports]),
        prefill=np.asarray(prefill),
        layer=layers,
    )
