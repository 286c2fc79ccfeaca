"""What scripts/bench_offload.py measured, as Markdown; imports no jax."""

from collections.abc import Iterable, Mapping
from typing import Any

from kernel_bench.report import markdown_table

TIME_IS_OVER = "the time is over"
NOT_BEGUN = f"not begun, {TIME_IS_OVER}"


def offload_table(result: Mapping[str, Any]) -> str:
    """Returns a table of all that was measured, and below it what was not."""
    names = result["lines"]
    head = ["way", *names, "decode, predicted at load", "decode, prefill mispredicted by"]
    rows = (
        (
            row["way"],
            *(_cell(row, name) for name in names),
            _number(row["predicted_at_load"]),
            f"{_share(row['decode_error'])}, {_share(row['prefill_error'])}",
        )
        for row in result["rows"]
    )
    text = [
        f"{result['shape']} with {result['layers']} of {result['whole_layers']} layers "
        f"({result['layers_chosen_by']}), {result['device_memory']} on the device "
        f"({result['budget_chosen_by']}), {result['device']}, {result['date']}. Tokens/s, of beams "
        "those of one text; in parentheses as predicted for the same steps.",
        "",
        markdown_table(head, rows),
        *ratios(result["rows"], names),
    ]
    if missing := unmeasured(result):
        text += ["", "Not measured:", "", *(f"* {way}: {reason}" for way, reason in missing)]
    return "\n".join(text)


def ratios(rows: Iterable[Mapping[str, Any]], names: Iterable[str]) -> list[str]:
    """Returns lines on how much faster than the other ways "plan" is, where both were measured."""
    found = {row["way"]: row["tokens_per_second"] for row in rows}
    plan = found.pop("plan", {})
    lines = []
    for name in names:
        others = {way: rates[name] for way, rates in found.items() if name in rates}
        if name in plan and others:
            text = ", ".join(f"{plan[name] / rate:.2f} x {way}" for way, rate in others.items())
            lines.append(f"* {name}: {text}")
    return ["", "plan is", "", *lines] if lines else []


def unmeasured(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns ways and why they, or some of their lines, were not measured.

    Holds for a result that was left while it was being made, too.
    """
    reasons = {entry["way"]: entry["reason"] for entry in result["not_measured"]}
    rates = {row["way"]: row["tokens_per_second"] for row in result["rows"]}
    found = []
    for way in result["ways"]:
        without = [name for name in result["lines"] if name not in rates.get(way, {})]
        if way in reasons or without:
            reason = reasons.get(way, TIME_IS_OVER if way in rates else NOT_BEGUN)
            some = f"; without {', '.join(without)}" if way in rates and without else ""
            found.append((way, reason + some))
    return found


def _cell(row: Mapping[str, Any], name: str) -> str:
    """Measured, and in parentheses what was predicted."""
    return rate_text(row["tokens_per_second"].get(name), row["predicted"].get(name))


def rate_text(measured: float | None, predicted: float | None) -> str:
    """Returns both as "30 (28)"; what there is not is left out."""
    return _number(measured) + (f" ({_number(predicted)})" if measured and predicted else "")


def _number(value: float | None) -> str:
    """Three digits or more; nothing where there is none."""
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.0%}"
