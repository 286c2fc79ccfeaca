"""Results on disk and on the screen: JSON files that are never half written, and tables.

Knows what the scripts measure by name; imports no jax, so that it can run beside the device.
"""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu")


def write_json(path: Path, value: Any) -> None:
    """Writes aside, makes sure that it is on the disk, and renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    with aside.open("w") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide about speed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    """Returns the date as 2026-01-31."""
    return date.today().isoformat()


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns lines of a Markdown table."""
    head = list(header)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def benchmark_table(result: Mapping[str, Any]) -> str:
    """Returns a benchmark's rows as a Markdown table, what was not measured below it."""
    rates = result["rates"]
    lines = [
        f"{result['device']}, jax {result['versions'].get('jax')}, {result['date']}: copies "
        f"{rates['copy_bytes_per_second'] / 1e9:.0f} GB/s, bfloat16 products "
        f"{rates['dense_flops_per_second'] / 1e12:.0f} TFLOP/s",
        "",
        markdown_table(
            ("case", "µs", "bound µs", "of bound", "tiles", "fastest alternative", "x as fast"),
            (_benchmark_row(row) for row in result["rows"]),
        ),
    ]
    lines += ["", *goals(result["rows"])]
    failures = [
        f"* {row['case']}: {other['name']}: {other['reason']}"
        for row in result["rows"]
        for other in row["alternatives"]
        if other["reason"]
    ]
    skipped = [f"* {entry['case']}: {entry['reason']}" for entry in result["skipped"]]
    for title, entries in (("Not measured", skipped), ("Alternatives that failed", failures)):
        if entries:
            lines += ["", f"{title}:", "", *entries]
    return "\n".join(lines)


def goals(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns a line on the shares promised, and one on the comparison with alternatives."""
    ran = [row for row in rows if row["microseconds"] is not None]
    promised = [row for row in ran if row["goal"]]
    missed = [row["case"] for row in promised if row["share"] < row["goal"]]
    compared = [row for row in ran if row["fastest_alternative"]]
    slower = [row["case"] for row in compared if row["times_as_fast"] < 1]
    return [
        f"Goal reached in {len(promised) - len(missed)} of {len(promised)} cases that have one; "
        f"missed: {', '.join(missed) or 'none'}.",
        f"At least as fast as every alternative in {len(compared) - len(slower)} of "
        f"{len(compared)} cases; slower: {', '.join(slower) or 'none'}.",
    ]


def _benchmark_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    bound = f"{row['bound_microseconds']:.1f} ({row['limit']})"
    if row["microseconds"] is None:
        return row["case"], "failed", bound, "", "", row["reason"], ""
    # A share above 1 means that caches or the clock fooled the measurement.
    doubt = "?" if row["share"] > 1.02 else ""
    if row["goal"] and row["share"] < row["goal"]:
        doubt += f" < {row['goal']:.0%}"
    doubt += " host-bound" if row["host_bound"] else ""
    fastest = row["fastest_alternative"]
    return (
        row["case"],
        f"{row['microseconds']:.1f}",
        bound,
        f"{row['share']:.0%}{doubt}",
        "measured" if row["measured"] else "guessed",
        f"{fastest['name']} {fastest['microseconds']:.1f}" if fastest else "none ran",
        f"{row['times_as_fast']:.2f}" if fastest else "",
    )
