"""Measures tiles of the kernels on this machine's GPU or TPU and writes them into tables.

Starts from the guess of each kernel and changes one size at a time, then two, as long as that is
faster and time is left. A table keeps what it has of other cases.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_line
import jax
from kernel_bench import tiles as kernel_tiles
from kernel_bench.cases import Arrays, Case, cases, memory_budget
from kernel_bench.report import today, versions, write_json
from kernel_bench.timing import compile_programs, difference, healthy, measure, reason

import pallas_kernels
from pallas_kernels.tuning import device_kind, table_name

OPERATIONS = ("paged_attention", "grouped_matmul")
# Results of other tiles may round differently; relative to the largest result.
TOLERANCE = 2e-2
_CRASHED = 3
# A candidate must be this much faster to replace the best: less is noise.
_CLEARLY_FASTER = 0.99


class Tuner:
    """Tries tiles of one case after another until the time is over."""

    def __init__(self, arguments: argparse.Namespace, implementation: str):
        self.arguments = arguments
        self.implementation = implementation
        self.deadline = time.monotonic() + arguments.seconds
        self.budget = memory_budget()
        self.lost = False  # a kernel broke the device for this process

    def time_is_over(self) -> bool:
        return self.lost or time.monotonic() > self.deadline

    def tune(self, case: Case) -> tuple[str, dict[str, Any]]:
        """Returns the key of a case in its table, and the entry."""
        arrays = case.make()
        plan = kernel_tiles.plan(case, arrays, self.implementation, self.arguments.interpret)
        trials: list[dict[str, Any]] = []
        expected: list[Any] = []
        best: tuple[float, Any] = (float("inf"), plan.tiles)
        fields, seen, waiting = 0, {plan.tiles}, [plan.tiles]
        while waiting:
            for tiles, entry in self._trials(plan, waiting, arrays, expected):
                trials.append(entry)
                seconds = entry.get("microseconds", float("inf")) / 1e6
                if seconds < best[0] * _CLEARLY_FASTER:
                    best, fields = (seconds, tiles), 0
            fields += 1
            room = self.arguments.candidates - len(trials)
            waiting = []
            if fields <= 2 and not self.time_is_over():
                found = kernel_tiles.neighbours(best[1], fields)
                waiting = [tiles for tiles in dict.fromkeys(found) if tiles not in seen][:room]
                seen |= set(waiting)
        if best[0] == float("inf"):
            raise ValueError(f"no tiles ran: {trials[0].get('refused')}")
        return plan.key, {
            "tiles": vars(best[1]),
            "microseconds": best[0] * 1e6,
            "guess_microseconds": trials[0].get("microseconds"),
            "case": case.name,
            "jax": jax.__version__,
            "date": today(),
            "trials": trials,
        }

    def _trials(
        self, plan: kernel_tiles.Plan, waiting: list[Any], arrays: Arrays, expected: list[Any]
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yields what each candidate took, or why it was refused; the first result is believed."""
        by_name = {str(number): tiles for number, tiles in enumerate(waiting)}
        functions = {
            name: lambda tiles=tiles, **call: plan.run(tiles, **call)
            for name, tiles in by_name.items()
        }
        programs = compile_programs(functions, arrays, self.budget, self.arguments.workers)
        for name, tiles in by_name.items():
            entry: dict[str, Any] = {"tiles": vars(tiles)}
            yield tiles, entry | self._trial(programs[name], arrays, expected)

    def _trial(self, program: Any, arrays: Arrays, expected: list[Any]) -> dict[str, Any]:
        if isinstance(program, str):
            return {"refused": program}
        if self.time_is_over() and expected:
            return {"refused": "the device was lost" if self.lost else "no time was left"}
        try:
            results = program(*arrays)
            expected[:] = expected or results
            worst = max(map(difference, results, expected))
            if worst > TOLERANCE:
                return {"refused": f"differs from the first tiles by {worst:.1g} of the largest"}
            timing = measure(program, arrays, self.arguments.sample_seconds)
        except Exception as error:  # a kernel may fail in ways of its own when it runs
            self.lost = not healthy()
            return {"refused": reason(error)}
        return {"microseconds": timing.seconds * 1e6, "spread": timing.spread}


def read_entries(path: Path) -> dict[str, Any]:
    """Returns the entries of a table, none if there is no file.

    Raises:
      ValueError: there is a file that is no table.
    """
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text())["entries"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table ({error!r}); move it away") from error


def merge_into_table(path: Path, key: str, entry: dict[str, Any]) -> None:
    """Adds an entry to a table, or replaces it; other entries stay."""
    entries = read_entries(path)
    head = {"device": device_kind(), "jax": jax.__version__, "date": today()}
    write_json(path, head | {"versions": versions(), "entries": entries | {key: entry}})


def tuned_already(table: Path, since: str) -> set[str]:
    """Returns the names of the cases that a table has from this day on, with this jax."""
    return {
        entry.get("case", "")
        for entry in read_entries(table).values()
        if entry.get("date", "") >= since and entry.get("jax") == jax.__version__
    }


def tune_all(arguments: argparse.Namespace, implementation: str) -> int:
    """Tunes case after case; returns the exit code."""
    tuner = Tuner(arguments, implementation)
    wanted = [
        case
        for name in arguments.operation or OPERATIONS
        for case in cases(name, arguments.shapes, tiny=arguments.interpret)
    ]
    table = table_name(implementation, device_kind())
    paths = {name: Path(arguments.out) / name / "tiles" / table for name in OPERATIONS}
    done = {name: tuned_already(paths[name], today()) for name in OPERATIONS}
    written = 0
    for number, case in enumerate(sorted(wanted, key=lambda case: case.rank), start=1):
        place = f"[{number}/{len(wanted)}] {case.operation} {case.name}"
        if arguments.resume and case.name in done[case.operation]:
            continue
        if tuner.lost:
            print("a kernel broke the device; run again with --resume", file=sys.stderr)
            return _CRASHED
        if tuner.time_is_over():
            print(f"{place}: not reached within {arguments.seconds} s", flush=True)
            continue
        if case.memory > tuner.budget:
            size, limit = case.memory / 2**30, tuner.budget / 2**30
            print(f"{place}: skipped, needs {size:.0f} of {limit:.0f} GiB", flush=True)
            continue
        try:
            key, entry = tuner.tune(case)
        except Exception as error:  # the next case may do better
            print(f"{place}: FAILED, {reason(error)}", flush=True)
            continue
        merge_into_table(paths[case.operation], key, entry)
        written += 1
        before, after = entry["guess_microseconds"], entry["microseconds"]
        print(
            f"{place}: {after:.1f} µs (guess {before and f'{before:.1f}'}), "
            f"{len(entry['trials'])} tried, {entry['tiles']}",
            flush=True,
        )
    return 0 if written or arguments.resume else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--operation", action="append", choices=OPERATIONS, help="only this one (both)")
    add("--shapes", default="", help="only cases whose name contains this")
    add("--seconds", type=float, default=120, help="stop trying after this long (120)")
    add("--candidates", type=int, default=24, help="tiles tried per case (24)")
    add("--sample-seconds", type=float, default=0.005, help="device time per sample (0.005)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="programs compiled at once")
    package = Path(pallas_kernels.__file__).parent
    add("--out", default=str(package), help="folder of <operation>/tiles/*.json (the package)")
    add("--resume", action="store_true", help="leave out cases that were tuned today")
    add("--interpret", action="store_true", help="interpret tiny shapes on any backend, for tests")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    backend = jax.default_backend()
    if backend not in ("gpu", "tpu") and not arguments.interpret:
        print(
            f"tune.py cannot measure tiles on the backend {backend!r}: it needs a GPU or a TPU; "
            "--interpret runs tiny shapes to try the script itself",
            file=sys.stderr,
        )
        return 2
    return tune_all(arguments, "tpu" if backend == "tpu" else "gpu")


if __name__ == "__main__":
    command_line.run(main)
