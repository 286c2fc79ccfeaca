"""Prints what an expert costs on this machine: on the host, on the device, over the link.

Measures it, up to 10 s, unless that was kept by an earlier run or by loading the model. Without a
checkpoint: the embedded reference model.
"""

import argparse
import json
import logging
import sys
from typing import Any

import command_line
import jax

from host_offload.calibration import Calibration, fit_flat_then_linear
from host_offload.memory import format_bytes, keep_freed_memory
from moe_jax.checkpoint import open_checkpoint
from moe_jax.config import ModelConfig
from moe_jax.engine.costs import calibrate
from moe_jax.engine.load import reference_model_folder
from moe_jax.engine.sizing import read_dtype

# Reading weights is nearly all that the host does for so few tokens.
FEW_TOKENS = 4
GOOD_SHARE = 0.7
SHORT_SECONDS = 50e-6


def figures(
    config: ModelConfig, dtype: str, host_dtype: str | None, found: Calibration
) -> dict[str, Any]:
    """What is printed, as JSON values; times in seconds, rates per second."""
    start, floor, per_token = fit_flat_then_linear(found.sizes, found.host.seconds)
    operations = 6 * config.embed * config.moe.ffn  # of one token: three products
    rows = []
    for i, tokens in enumerate(found.sizes):
        rate = found.work_bytes / found.host.seconds[i]
        rows.append(
            {
                "tokens": tokens,
                "host": found.host.seconds[i],
                "host_p90": found.host.p90[i],
                "host_measured": found.host.measured[i],
                "host_bytes_per_second": rate,
                "share_of_read_limit": rate / found.read_rate,
                "device": found.device.seconds[i],
                "device_p90": found.device.p90[i],
                "device_measured": found.device.measured[i],
                "stream": found.link_latency + found.transfer + found.device.seconds[i],
            }
        )
    return {
        "expert": {
            "embed": config.embed,
            "ffn": config.moe.ffn,
            "dtype": dtype,
            "host_dtype": host_dtype or dtype,
        },
        "backend": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "expert_bytes": found.work_bytes,
        "read_bytes_per_second": found.read_rate,
        "link_latency": found.link_latency,
        "link_bytes_per_second": found.work_bytes / found.transfer,
        "host_launch": found.host_launch,
        "host_fit": {
            "start": start,
            "bytes_per_second": found.work_bytes / floor if floor else None,
            "operations_per_second": operations / per_token if per_token else None,
            "knee_tokens": floor / per_token if per_token else None,
        },
        "seconds_to_calibrate": found.spent,
        "rows": rows,
    }


def dtypes(expert: dict[str, Any]) -> str:
    """The dtype of the weights, and that of the host's where it is another."""
    if expert["host_dtype"] == expert["dtype"]:
        return expert["dtype"]
    return f"{expert['dtype']}, {expert['host_dtype']} in host memory"


def text(result: dict[str, Any]) -> str:
    expert = result["expert"]
    lines = [
        f"one expert: embed {expert['embed']}, ffn {expert['ffn']}, {dtypes(expert)}, "
        f"{format_bytes(result['expert_bytes'])}; backend {result['backend']} "
        f"({result['device_kind']}), jax {result['jax']}",
        f"host memory  read at {result['read_bytes_per_second'] / 1e9:.1f} GB/s",
        f"link         {result['link_bytes_per_second'] / 1e9:.1f} GB/s, starting takes "
        f"{result['link_latency'] * 1e6:.0f} µs"
        + (" (none here: what streaming takes)" if result["backend"] == "cpu" else ""),
        f"host call    {result['host_launch'] * 1e6:.0f} µs",
        "",
        f"{'tokens':>6} {'host ms':>9} {'p90':>9} {'GB/s':>7} {'of limit':>8} "
        f"{'device ms':>10} {'stream ms':>10}",
    ]
    for row in result["rows"]:
        inferred = not (row["host_measured"] and row["device_measured"])
        lines.append(
            f"{row['tokens']:>6} {row['host'] * 1e3:>9.3f} {row['host_p90'] * 1e3:>9.3f} "
            f"{row['host_bytes_per_second'] / 1e9:>7.1f} {row['share_of_read_limit']:>8.0%} "
            f"{row['device'] * 1e3:>10.3f} {row['stream'] * 1e3:>10.3f}" + " *" * inferred
        )
    if any(not (row["host_measured"] and row["device_measured"]) for row in result["rows"]):
        lines.append("* inferred from other counts, at least in part: time was short")
    fit = result["host_fit"]
    if fit["operations_per_second"]:
        fitted = f"host fit: {fit['operations_per_second'] / 1e12:.2f} TFLOP/s"
        if fit["knee_tokens"] > FEW_TOKENS:  # else it says nothing about reading
            fitted += (
                f", up to {fit['knee_tokens']:.0f} tokens flat at "
                f"{fit['bytes_per_second'] / 1e9:.1f} GB/s"
            )
        lines += ["", f"{fitted}, and {fit['start'] * 1e6:.0f} µs at any count"]
    return "\n".join(lines + warnings_of(result))


def warnings_of(result: dict[str, Any]) -> list[str]:
    """A line for each small count at which the host was seen to be slow."""
    lines = [
        f"SLOW: with {row['tokens']} token(s) the host reads weights at "
        f"{row['share_of_read_limit']:.0%} of the read limit, below {GOOD_SHARE:.0%}"
        for row in result["rows"]
        if row["tokens"] <= FEW_TOKENS
        and row["host_measured"]
        and row["share_of_read_limit"] < GOOD_SHARE
    ]
    reading = result["expert_bytes"] / result["read_bytes_per_second"]
    if lines and reading < SHORT_SECONDS:
        lines.append(
            f"(at the limit it would take {reading * 1e6:.0f} µs: for an expert this small, "
            "starting threads takes longer)"
        )
    return lines


def new_figure() -> Any:
    """An empty picture; raises ValueError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional: the train extra
    except ImportError as error:
        raise ValueError(
            "drawing needs matplotlib, which is not installed: pip install 'moe-jax[train]'"
        ) from error
    return Figure(figsize=(8, 5), layout="constrained")


def draw(result: dict[str, Any], figure: Any) -> None:
    """Draws the curves."""
    rows = result["rows"]
    tokens = [row["tokens"] for row in rows]
    axes = figure.subplots()
    names = {"host": "host", "device": "device, weights there", "stream": "device, streamed"}
    for (key, label), style in zip(names.items(), ("o-", "s-", "^--"), strict=True):
        milliseconds = [row[key] * 1e3 for row in rows]
        (line,) = axes.plot(tokens, milliseconds, style, label=label)
        if key != "stream":
            p90 = [row[f"{key}_p90"] * 1e3 for row in rows]
            axes.fill_between(tokens, milliseconds, p90, color=line.get_color(), alpha=0.2)
    limit = result["expert_bytes"] / result["read_bytes_per_second"] * 1e3
    axes.axhline(limit, color="grey", linestyle=":", label="reading the weights from host memory")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(n) for n in tokens])
    expert = result["expert"]
    axes.set(
        xlabel="tokens of one expert",
        ylabel="milliseconds (band: up to the 90th percentile)",
        title=f"One expert, embed {expert['embed']}, ffn {expert['ffn']}, {dtypes(expert)}, "
        f"on {result['device_kind']}",
    )
    axes.grid(alpha=0.3)
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", help="Hugging Face or saved folder (default: embedded model)")
    add("--dtype", default="bfloat16", help="bfloat16 or float32 (bfloat16)")
    add("--host-dtype", choices=["int8"], help="int8 for experts kept in 8 bits in host memory")
    add("--again", action="store_true", help="measure even if a calibration was kept")
    add("--out", metavar="PICTURE", help="draw the curves into this PNG file")
    add("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args()
    figure = new_figure() if arguments.out else None
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    config = open_checkpoint(arguments.checkpoint or reference_model_folder()).config
    if jax.default_backend() == "cpu":
        keep_freed_memory()  # as when a model is loaded
    found = calibrate(
        config,
        read_dtype(arguments.dtype),
        arguments.host_dtype,
        recalibrate=arguments.again,
        progress=sys.stderr.isatty(),
    )
    result = figures(config, arguments.dtype, arguments.host_dtype, found)
    print(json.dumps(result, indent=1) if arguments.json else text(result))
    if figure is not None:
        draw(result, figure)
        figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    command_line.run(main)
