"""Draws the log of a training run.

Knows only the log's lines: JSON, of settings or of steps.
"""

import json
import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw_curve(log: pathlib.Path, picture: pathlib.Path, reference: float | None = None) -> None:
    """Draws bits per byte, what answers cost, and the experts' shares, over steps.

    Args:
      log: training.jsonl.
      picture: where the PNG goes.
      reference: bits per byte of xz, drawn as a line; None: no line.
    """
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(8, 8), layout="constrained")
    text, answers, shares = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 1])

    def plot(axes: Axes, name: str, label: str, **style: Any) -> None:
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), label=label, **style)

    plot(text, "training_bits_per_byte", "training text")
    plot(text, "held_out_bits_per_byte", "held-out modules (sample)", marker="o")
    if reference is not None:
        text.axhline(
            reference, color="grey", linestyle="--", label="xz -9e on the same sample, solid"
        )
    text.set(ylabel="bits per byte")
    plot(answers, "answer_nats", "answers of the tasks (training split)")
    answers.set(ylabel="nats per token", yscale="log")
    plot(shares, "least_share", "least used expert")
    plot(shares, "most_share", "most used expert")
    shares.set(xlabel="steps", ylabel="share / fair share", ylim=(0, None))
    for axes in (text, answers, shares):
        axes.legend()
    figure.savefig(picture, dpi=110)
