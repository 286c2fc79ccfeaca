"""Draws the log of a training run.

Knows only the log's lines: JSON, settings first.
"""

import json
import pathlib

from matplotlib.figure import Figure


def draw_curve(log: pathlib.Path, picture: pathlib.Path, reference: float | None = None) -> None:
    """Draws bits per byte on training and held-out text, and the experts' shares, over epochs.

    Args:
      log: training.jsonl.
      picture: where the PNG goes.
      reference: bits per byte of xz, drawn as a line; None: no line.
    """
    _, *lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    measured = [line for line in lines if "held_out_bits_per_byte" in line]
    upper.plot(
        [line["epochs"] for line in lines],
        [line["training_bits_per_byte"] for line in lines],
        label="training text",
    )
    upper.plot(
        [line["epochs"] for line in measured],
        [line["held_out_bits_per_byte"] for line in measured],
        marker="o",
        label="held-out modules (sample)",
    )
    if reference is not None:
        upper.axhline(
            reference, color="grey", linestyle="--", label="xz -9e on the same sample, solid"
        )
    upper.set(ylabel="bits per byte", ylim=(0.6, 2.6))
    upper.legend()
    for name, label in (("least_share", "least used expert"), ("most_share", "most used expert")):
        lower.plot([line["epochs"] for line in lines], [line[name] for line in lines], label=label)
    lower.set(xlabel="passes over the training text", ylabel="share / fair share", ylim=(0, None))
    lower.legend()
    figure.savefig(picture, dpi=110)
