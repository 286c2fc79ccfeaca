"""Times the kernels at the shapes of real models, against the device's limits and alternatives.

A bound is the larger of two times: the bytes a call must move at the measured copy rate, and its
operations at the measured rate of a dense product. Prints a table; --out writes JSON.
"""

import argparse
import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import jax
from kernel_bench.alternatives import alternatives, as_it_is
from kernel_bench.cases import Arrays, Case, cases, memory_budget
from kernel_bench.report import benchmark_table, today, versions, write_json
from kernel_bench.tiles import plan
from kernel_bench.timing import compile_programs, device_rates, difference, healthy, measure, reason

OPERATIONS = ("paged_attention", "grouped_matmul")
# Alternatives round at other places than we do; more than this is another result.
_TOLERANCE = 3e-2
_OURS, _COMPILERS = "ours", "the compilers"
# A case that takes longer hangs; the process ends, and --resume goes on behind it.
_HANG_SECONDS = 90
_CRASHED = 3


class DeviceLost(RuntimeError):
    """A kernel broke the device for this process."""


class Bench:
    """A benchmark whose state is on the disk before anything that could end the process.

    `result["running"]` names what is under way: if it is still there when the next process takes
    over, that is what ended the last one, and it is left out from then on.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.out = Path(arguments.out) if arguments.out else None
        self.result: dict[str, Any] = {"rows": [], "skipped": [], "broken": {}, "running": None}
        if arguments.resume and self.out and self.out.exists():
            try:
                self.result = json.loads(self.out.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.out} is not JSON ({error}); move it away") from error
            self._leave_out_what_was_running()
        gib = arguments.memory_gib
        self.budget = int(gib * 2**30) if gib else memory_budget()

    def _leave_out_what_was_running(self) -> None:
        running, self.result["running"] = self.result["running"], None
        if running is None:
            return
        why = f"{running['name']} ended the process in {running['case']}"
        if running["name"] in (_OURS, _COMPILERS):
            self.result["skipped"].append({"case": running["case"], "reason": why})
        else:
            self.result["broken"][running["name"]] = why

    def save(self, **changes: Any) -> None:
        """Brings what is known onto the disk."""
        self.result |= changes
        if self.out:
            write_json(self.out, self.result)

    def run(self) -> None:
        """Measures case after case, those not yet measured, until the time is over."""
        arguments = self.arguments
        deadline = time.monotonic() + arguments.seconds
        self.save(
            date=today(),
            device=jax.devices()[0].device_kind,
            backend=jax.default_backend(),
            versions=versions(),
            command=" ".join(["python", *sys.argv]),
            rates=self.result.get("rates") or device_rates(arguments.tiny),
        )
        print(f"{self.result['device']}: {self.result['rates']}", flush=True)
        wanted = [
            case
            for name in arguments.operation or OPERATIONS
            for case in cases(name, arguments.shapes, tiny=arguments.tiny)
        ]
        done = {entry["case"] for entry in self.result["rows"] + self.result["skipped"]}
        for number, case in enumerate(sorted(wanted, key=lambda case: case.rank), start=1):
            if case.name in done:
                continue
            skip = None
            if time.monotonic() > deadline:
                skip = f"not reached within {arguments.seconds:.0f} s"
            elif case.memory > self.budget:
                skip = f"needs {case.memory / 2**30:.0f} of {self.budget / 2**30:.0f} GiB"
            said = self._run_case(case) if skip is None else self._skip(case, skip)
            print(f"[{number}/{len(wanted)}] {case.operation} {case.name}: {said}", flush=True)
            self.save(running=None)

    def _skip(self, case: Case, why: str) -> str:
        self.result["skipped"].append({"case": case.name, "reason": why})
        return f"skipped: {why}"

    def _run_case(self, case: Case) -> str:
        faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True, file=2)
        try:
            row = self._row(case)
        except DeviceLost:
            raise
        except Exception as error:  # out of memory for the arrays, say; the next may fit
            return self._skip(case, reason(error))
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.result["rows"].append(row)
        if row["microseconds"] is None:
            return row["reason"]
        return f"{row['microseconds']:.1f} µs, {row['share']:.0%} of the bound"

    def _row(self, case: Case) -> dict[str, Any]:
        """Returns what our kernel and every alternative took, or why they did not run."""
        backend, rates = jax.default_backend(), self.result["rates"]
        arrays = case.make()
        copy = case.bytes / rates["copy_bytes_per_second"]
        dense = case.flops / rates["dense_flops_per_second"]
        row: dict[str, Any] = {
            "case": case.name,
            "operation": case.operation,
            "regime": case.regime,
            "bytes": case.bytes,
            "flops": case.flops,
            "goal": case.goal,
            "bound_microseconds": max(copy, dense) * 1e6,
            "limit": "copy" if copy >= dense else "dense",
        }
        functions: dict[str, Callable[..., Any]] = {}
        failures: dict[str, str] = {}
        try:
            kernel = "tpu" if backend == "tpu" else "gpu"
            ours = plan(case, arrays, kernel, interpret=backend == "cpu")
            row |= {"tiles": vars(ours.tiles), "measured": ours.measured, "key": ours.key}
            functions[_OURS] = lambda **call: ours.run(ours.tiles, **call)
        except Exception as error:  # a refusal is a result; alternatives are still worth knowing
            failures[_OURS] = reason(error)

        # Programs that read the same layout of the shared arrays are compiled and run together.
        layouts: dict[Callable[..., Any], dict[str, Callable[..., Any]]] = {as_it_is: functions}
        for other in alternatives(case, backend):
            try:
                if other.name in self.result["broken"]:
                    raise DeviceLost(self.result["broken"][other.name])
                call = other.build()
            except Exception as error:  # not installed, or cannot do this
                failures[other.name] = reason(error)
                continue
            layouts.setdefault(other.layout, {})[other.name] = call

        entries: dict[str, dict[str, Any]] = {}
        expected: list[jax.Array] = []
        for layout, calls in layouts.items():
            self.save(running={"case": case.name, "name": _COMPILERS})
            try:
                relaid = Arrays(layout(arrays.shared), arrays.calls)
            except Exception as error:  # out of memory, mostly
                failures |= dict.fromkeys(calls, reason(error))
                continue
            programs = compile_programs(calls, relaid, self.budget, self.arguments.workers)
            # The plainest one first: if it runs, everything else has to agree with it.
            for name in sorted(programs, key=lambda name: name != "xla"):
                self.save(running={"case": case.name, "name": name})
                entries[name] = self._time(programs[name], relaid, expected)
            del relaid, programs
        entries |= {name: _failed(why) for name, why in failures.items()}
        return row | _compared(entries, row["bound_microseconds"])

    def _time(self, program: Any, arrays: Arrays, expected: list[jax.Array]) -> dict[str, Any]:
        """Returns a program's time, if its results are those of the first one that ran.

        Raises:
          DeviceLost: after it, nothing runs any more.
        """
        if isinstance(program, str):
            return _failed(program)
        try:
            results = program(*arrays)
            expected[:] = expected or results
            worst = max(map(difference, results, expected))
            if worst > _TOLERANCE:
                return _failed(f"its result differs by {worst:.1g} of the largest")
            del results
            timing = measure(program, arrays, self.arguments.sample_seconds)
        except Exception as error:
            if not healthy():
                raise DeviceLost(reason(error)) from error
            return _failed(reason(error))
        return {
            "microseconds": timing.seconds * 1e6,
            "reason": None,
            "spread": timing.spread,
            "host_bound": timing.host_bound,
        }


def _failed(why: str) -> dict[str, Any]:
    return {"microseconds": None, "reason": why}


def _compared(entries: dict[str, dict[str, Any]], bound: float) -> dict[str, Any]:
    ours = entries.pop(_OURS)
    others = [{"name": name} | entry for name, entry in entries.items()]
    ran = [entry for entry in others if entry["microseconds"] is not None]
    fastest = min(ran, key=lambda entry: entry["microseconds"], default=None)
    compared: dict[str, Any] = {"alternatives": others, "fastest_alternative": fastest}
    if ours["microseconds"] is not None:
        compared["share"] = bound / ours["microseconds"]
        if fastest:
            compared["times_as_fast"] = fastest["microseconds"] / ours["microseconds"]
    return ours | compared


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--operation", action="append", choices=OPERATIONS, help="only this one (both)")
    add("--shapes", default="", help="only cases whose name contains this")
    add("--seconds", type=float, default=3600, help="start no case after this long (3600)")
    add("--memory-gib", type=float, help="device memory to use (85 %% of what there is)")
    add("--sample-seconds", type=float, default=0.01, help="device time per sample (0.01)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="programs compiled at once")
    add("--out", help="file for the JSON result")
    add("--resume", action="store_true", help="go on with what --out has, past what crashed")
    add("--tiny", action="store_true", help="tiny shapes on any backend, for tests")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    backend = jax.default_backend()
    if backend not in ("gpu", "tpu") and not arguments.tiny:
        print(
            f"bench_kernels.py has no kernel to time on the backend {backend!r}: it needs a GPU or "
            "a TPU; --tiny tries the script itself",
            file=sys.stderr,
        )
        return 2
    bench = Bench(arguments)
    try:
        bench.run()
    except DeviceLost as error:
        running = bench.result["running"]
        print(f"{running['name']} broke the device in {running['case']}: {error}", file=sys.stderr)
        return _CRASHED
    print("\n" + benchmark_table(bench.result))
    return 0 if any(row["microseconds"] for row in bench.result["rows"]) else 1


if __name__ == "__main__":
    command_line.run(main)
