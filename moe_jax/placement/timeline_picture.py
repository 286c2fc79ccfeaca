"""Draws a timeline: a lane for each resource, a bar for each piece of work. Needs matplotlib."""

from typing import Any

from moe_jax.placement.timeline import LANES, Timeline


def draw_timeline(timeline: Timeline, *, layers: int = 8, title: str | None = None) -> Any:
    """A matplotlib figure of the first layers; grey is dense work, numbers are experts.

    Raises ValueError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional: the train extra
    except ImportError as error:
        raise ValueError(
            "drawing needs matplotlib, which is not installed: pip install 'moe-jax[train]'"
        ) from error
    shown = [span for span in timeline.spans if span.layer < layers]
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots()
    end = max((span.end for span in shown), default=0.0)
    for span in shown:
        dense = span.expert < 0
        axes.barh(
            LANES.index(span.lane),
            1e3 * (span.end - span.start),
            left=1e3 * span.start,
            color="lightgrey" if dense else f"C{span.expert % 10}",
            edgecolor="white",
            linewidth=0.5,
        )
        if not dense and span.end - span.start > 0.015 * end:
            middle = 500 * (span.start + span.end)
            axes.text(middle, LANES.index(span.lane), str(span.expert), ha="center", va="center")
    for layer, start in timeline.layer_starts.items():
        if layer < layers:
            axes.axvline(1e3 * start, color="black", linewidth=0.5, linestyle=":")
    axes.set_yticks(range(len(LANES)), LANES)
    axes.invert_yaxis()
    axes.set(xlabel="ms (grey: dense part; numbers: experts; dotted: a layer begins)", title=title)
    return figure
