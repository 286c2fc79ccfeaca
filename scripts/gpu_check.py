"""Checks a machine with an NVIDIA GPU: tests of the kernels, tuning and benchmarks in one command.

Every part is a process of its own with a share of the time that is left, so that a crash or a hang
ends only itself. Writes gpu_check.json, gpu_check.md, the tables of tiles and the tests' output
into --out. Needs jax, flax, numpy, jaxtyping and pytest; the last part, orchestration, which is a
model that does not fit, needs what moe_jax needs, and 3 GB of disk for each layer for a while; with
torch, transformers and accelerate it measures these too. Layers are as many as the time allows:
--only orchestration --minutes 25 gives that part more.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import command_line
from kernel_bench.report import (
    benchmark_table,
    markdown_table,
    today,
    versions,
    write_json,
)
from offload_bench.table import TIME_IS_OVER, offload_table, unmeasured

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
OPERATIONS = ("paged_attention", "grouped_matmul")
# The first word of every part's name.
KINDS = ("tests", "tune", "bench", "orchestration")
_PROBE = "import jax; d = jax.devices()[0]; print('DEVICE', d.platform, d.device_kind, sep='|')"
_PROBE_SECONDS = 60
# What a part needs to finish what it has begun when its own time is over.
_GRACE_SECONDS = 12
_MOST_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command; `{seconds}` in it becomes the time it should plan with.

    Attributes:
      weight: its share of the time that is left, among the parts that are still to come.
      resume: added to the command when it has crashed and is started again.
      log: file for its whole output.
    """

    name: str
    command: Sequence[str]
    weight: float
    resume: Sequence[str] = ()
    log: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a part ended; `problem` is None if it ended well."""

    name: str
    seconds: float
    problem: str | None
    last_line: str


def run_part(part: Part, seconds: float) -> Outcome:
    """Runs one part, shows its output as it comes, and kills it with all its children in time."""
    print(f"\n== {part.name} (at most {seconds:.0f} s)", flush=True)
    start = time.monotonic()
    planned = f"{max(seconds - _GRACE_SECONDS, 0.5 * seconds):.0f}"
    command = [argument.replace("{seconds}", planned) for argument in part.command]
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: list[str] = []

    def show() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.append(line)
                print(f"  {line}", end="", flush=True)

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    try:
        code, problem = process.wait(timeout=seconds), None
    except subprocess.TimeoutExpired:
        code, problem = None, f"stopped after {seconds:.0f} s"
    finally:
        _kill_group(process)  # also what a part that has ended left behind
    reader.join(timeout=5)
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if code:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        problem = f"{how}: {last}"
    if part.log:
        part.log.write_text("".join(lines))
    outcome = Outcome(
        name=part.name, seconds=time.monotonic() - start, problem=problem, last_line=last
    )
    print(f"== {part.name}: {problem or 'ok'} ({outcome.seconds:.0f} s)", flush=True)
    return outcome


def _kill_group(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody is left
        return
    process.wait()


def run_parts(
    parts: Sequence[Part], deadline: float, after: Callable[[Sequence[Outcome]], None]
) -> list[Outcome]:
    """Runs all parts one after the other; none of them can take what the later ones need.

    Args:
      deadline: on the monotonic clock.
      after: called with all outcomes so far whenever a part has ended.
    """
    outcomes: list[Outcome] = []
    for number, part in enumerate(parts):
        left = deadline - time.monotonic()
        share = left * part.weight / sum(later.weight for later in parts[number:])
        outcomes += _run_until_it_ends_well(part, max(share, 1))
        after(outcomes)
    return outcomes


def _run_until_it_ends_well(part: Part, seconds: float) -> list[Outcome]:
    """Starts a part again after a crash, while there is time: what broke it will be left out."""
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for attempt in range(_MOST_ATTEMPTS):
        left = end - time.monotonic()
        if attempt and (not part.resume or left < _GRACE_SECONDS):
            break
        again = part.resume if attempt else ()
        name = f"{part.name}, again" if attempt else part.name
        try:
            tried = replace(part, name=name, command=[*part.command, *again])
            outcomes.append(run_part(tried, max(left, 1)))
        except OSError as error:  # it could not even be started
            problem = f"{type(error).__name__}: {error}"
            outcomes.append(Outcome(name=name, seconds=0, problem=problem, last_line=""))
        if outcomes[-1].problem is None:
            break
    return outcomes


def plan_parts(
    out: Path,
    scratch: Path,
    dry_run: bool,
    only: Sequence[str] = KINDS,
    orchestration: Sequence[str] = (),
) -> list[Part]:
    """Returns tests, tuning and benchmarks; one process per operation.

    Args:
      only: the kinds of parts that are wanted.
      orchestration: options of that part, in place of what it would choose.
    """
    python = sys.executable
    tests = [python, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "-o", "addopts="]
    tests += ["--strict-markers", "--import-mode=importlib", "--continue-on-collection-errors"]
    tests += ["-W", "default"]  # what an unknown machine warns of is no failure here
    if dry_run:
        tests += ["tests/pallas_kernels/test_choose.py"]
    else:
        tests += ["-m", "accelerator", "tests/pallas_kernels"]
    quick = ["--sample-seconds", "0.001", "--shapes"]
    tiny = {"paged_attention": [*quick, "decode"], "grouped_matmul": [*quick, "down 4 "]}
    parts = [Part(name="tests", command=tests, weight=3, log=out / "tests.log")]
    for operation in OPERATIONS:
        command = [python, str(SCRIPTS / "tune.py"), "--operation", operation]
        command += ["--seconds", "{seconds}", "--candidates", "2" if dry_run else "12"]
        if dry_run:
            # What a CPU takes to interpret is no measurement: it stays out of the package.
            command += ["--interpret", "--out", str(scratch), *tiny[operation]]
        parts.append(Part(name=f"tune {operation}", command=command, weight=2, resume=["--resume"]))
    for operation in OPERATIONS:
        command = [python, str(SCRIPTS / "bench_kernels.py"), "--operation", operation]
        command += ["--seconds", "{seconds}", "--out", str(scratch / f"{operation}.json")]
        if dry_run:
            command += ["--tiny", *tiny[operation]]
        parts.append(
            Part(name=f"bench {operation}", command=command, weight=2, resume=["--resume"])
        )
    command = [python, str(SCRIPTS / "bench_offload.py"), "--seconds", "{seconds}"]
    command += ["--out", str(scratch / "orchestration.json")]
    command += ["--checkpoint", str(scratch / "checkpoint"), "--repeats"]
    if dry_run:
        command += ["1", "--shape", "mixtral_0.8b", "--layers", "1", "--device-memory", "250MB"]
        command += ["--ways", "host", "--prefill", "8", "--decode", "2", "--beams", "2"]
    else:
        command += ["2"]
    parts.append(Part(name="orchestration", command=[*command, *orchestration], weight=4))
    return [part for part in parts if part.name.split()[0] in only]


def collect(out: Path, scratch: Path, tables: Path, device: str, started: float) -> dict[str, Any]:
    """Gathers what the parts left behind; copies the tables of tiles."""
    result: dict[str, Any] = {"benchmarks": {}, "tables": [], "unreadable": []}
    for name in (*OPERATIONS, "orchestration"):
        file = scratch / f"{name}.json"
        if file.exists():
            try:
                read = json.loads(file.read_text())
            except json.JSONDecodeError as error:
                result["unreadable"].append(f"{file.name}: {error}")
                continue
            if name == "orchestration":
                result["orchestration"] = read
            else:
                result["benchmarks"][name] = read
    for operation in OPERATIONS:
        for table in sorted((tables / operation / "tiles").glob("*.json")):
            if table.stat().st_mtime < started - 1:
                continue  # shipped with the package, not measured now
            target = out / operation / "tiles" / table.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(table, target)
            result["tables"].append(str(target.relative_to(out)))
    return result | {"device": device, "date": today(), "versions": versions()}


def report(outcomes: Sequence[Outcome], result: dict[str, Any]) -> str:
    """Returns the whole check as Markdown."""
    environment = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    rows = [
        (outcome.name, outcome.problem or "ok", f"{outcome.seconds:.0f}", outcome.last_line)
        for outcome in outcomes
    ]
    lines = [
        f"# Check of {result['device']}, {result['date']}",
        "",
        f"{environment}. Command: `{result['command']}`",
        "",
        markdown_table(("part", "result", "s", "last line"), (map(_cell, row) for row in rows)),
    ]
    for operation, benchmark in result["benchmarks"].items():
        lines += ["", f"## {operation}", "", benchmark_table(benchmark)]
    if measured := result.get("orchestration"):
        lines += ["", "## orchestration", "", offload_table(measured)]
        if any(TIME_IS_OVER in reason for _, reason in unmeasured(measured)):
            lines += ["", "With more time: `--only orchestration --minutes 25`"]
    asked = result.get("asked", KINDS)
    if "bench" in asked:
        missing = [name for name in OPERATIONS if name not in result["benchmarks"]]
        lines += [f"\nNo benchmark of {name} came back." for name in missing]
    if "orchestration" in asked and not measured:
        lines += ["\nNo result of the orchestration came back."]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:200]


def find_device() -> tuple[str, str]:
    """Returns platform and kind of jax's first device, asked in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "none", f"jax did not start within {_PROBE_SECONDS} s"
    for line in done.stdout.splitlines():
        if line.startswith("DEVICE|"):
            _, platform, kind = line.split("|", 2)
            return platform, kind
    return "none", (done.stderr.strip().splitlines() or ["jax printed nothing"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", required=True, help="folder for the results")
    add("--minutes", type=float, default=7.5, help="time for everything (7.5)")
    add("--only", nargs="+", choices=KINDS, default=list(KINDS), help="parts to run (all)")
    add(
        "--layers",
        type=int,
        help="of the model that does not fit (as many as memory, disk and time allow)",
    )
    add("--device-memory", help="its device budget (24GB, or what the device has)")
    add("--dry-run", action="store_true", help="tiny shapes on any backend, to try the script")
    arguments = parser.parse_args()
    started, clock = time.time(), time.monotonic()
    platform, kind = find_device()
    if platform != "gpu" and not arguments.dry_run:
        print(
            f"gpu_check.py needs an NVIDIA GPU that jax can use; it found {platform}: {kind}. "
            "Install jax[cuda13], or try the script itself with --dry-run",
            file=sys.stderr,
        )
        return 2
    print(f"{kind}; at most {arguments.minutes} minutes", flush=True)
    out = Path(arguments.out)
    scratch = out / "parts"
    scratch.mkdir(parents=True, exist_ok=True)
    tables = scratch if arguments.dry_run else ROOT / "pallas_kernels"
    # The report itself needs a moment.
    deadline = clock + 60 * arguments.minutes - 2

    def write(outcomes: Sequence[Outcome]) -> None:
        result = collect(out, scratch, tables, kind, started)
        result["command"] = " ".join(["python", *sys.argv])
        result["asked"] = arguments.only
        result["parts"] = [vars(outcome) for outcome in outcomes]
        write_json(out / "gpu_check.json", result)
        (out / "gpu_check.md").write_text(report(outcomes, result))

    chosen = {"--layers": arguments.layers, "--device-memory": arguments.device_memory}
    given = [
        word
        for option, value in chosen.items()
        if value is not None
        for word in (option, str(value))
    ]
    parts = plan_parts(out, scratch, arguments.dry_run, arguments.only, given)
    outcomes = run_parts(parts, deadline, write)
    shutil.rmtree(scratch)
    failed = [outcome.name for outcome in outcomes if outcome.problem]
    took = time.monotonic() - clock
    print(f"\n{out / 'gpu_check.md'} after {took:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    command_line.run(main)
