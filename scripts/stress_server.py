"""Keeps a server busy with many streams at once, and says what went wrong.

Starts scripts/serve.py with the embedded model, or takes the server at --url. Some clients leave
before their answer is complete. The same load runs for a while before, so that all programs are
compiled. It fails on any error, if requests or KV pages are still in use at the end, or if the
server's memory grew by more than 2 %.
"""

import argparse
import asyncio
import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import command_line

try:
    import openai
except ModuleNotFoundError:
    sys.exit("error: openai is not installed; pip install 'moe-jax[test]'")

SERVE = Path(__file__).with_name("serve.py")
GROWTH = 0.02
RESIDENT = "process_resident_memory_bytes"
IDLE = ("moe_jax_requests_running", "moe_jax_requests_waiting")
FREE = "moe_jax_kv_pages_free"


class Tally:
    """What the clients saw."""

    def __init__(self):
        self.finished = 0
        self.left = 0
        self.pieces = 0
        self.errors: list[str] = []


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", help="a server's address, such as http://127.0.0.1:8000 (default: start one)")
    add("--api-key", default="none", help="the server's key")
    add("--streams", type=int, default=64, metavar="N", help="at once (64)")
    add("--seconds", type=float, default=60.0, metavar="S", help="for how long (60)")
    add("--warm-up", type=float, default=60.0, metavar="S", help="seconds of the same before (60)")
    add("--max-tokens", type=int, default=48, metavar="N", help="per stream, at most (48)")
    add("--leaving", type=float, default=0.1, metavar="P", help="share of clients that leave (0.1)")
    return parser.parse_args()


@contextlib.contextmanager
def server(url: str | None) -> Iterator[str]:
    """The address of a server that is ready."""
    if url is not None:
        yield url.rstrip("/").removesuffix("/v1")
        return
    command = [sys.executable, str(SERVE), "--port", "0", "--quiet", "--drain-seconds", "5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if " is served at " in line:
                    yield line.split()[-1].removesuffix("/v1")
                    return
            raise ValueError("the server did not start; its own message says why")
        finally:
            process.terminate()
            process.stdout.read()


async def one_client(
    client: openai.AsyncOpenAI, model: str, arguments: argparse.Namespace, end: float, tally: Tally
) -> None:
    """Asks for one stream after the other."""
    while time.monotonic() < end:
        prompt = [random.randrange(1, 200) for _ in range(random.randrange(1, 100))]
        leaves_after = random.randrange(8) if random.random() < arguments.leaving else None
        try:
            stream = await client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=random.randrange(1, arguments.max_tokens + 1),
                temperature=random.choice([0.0, 1.0]),
                stream=True,
                stream_options={"include_usage": True},
            )
            pieces, usage = 0, None
            async with stream:
                async for part in stream:
                    pieces, usage = pieces + 1, part.usage
                    if pieces == leaves_after:
                        break
        except openai.APIError as error:
            tally.errors.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.1)
            continue
        tally.pieces += pieces
        if usage is not None:
            tally.finished += 1
        elif leaves_after is not None:
            tally.left += 1
        else:
            tally.errors.append("a stream ended without its usage")


async def many_clients(
    client: openai.AsyncOpenAI,
    model: str,
    arguments: argparse.Namespace,
    seconds: float,
    tally: Tally,
) -> None:
    """As many as there shall be streams."""
    end = time.monotonic() + seconds
    streams = range(arguments.streams)
    await asyncio.gather(*(one_client(client, model, arguments, end, tally) for _ in streams))


async def measure(client: openai.AsyncOpenAI, url: str) -> dict[str, float]:
    """The server's own numbers."""
    text = await client.get(f"{url}/metrics", cast_to=str)
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def settle(client: openai.AsyncOpenAI, url: str) -> dict[str, float]:
    """Its numbers once nothing runs, or after ten seconds."""
    for _ in range(100):
        numbers = await measure(client, url)
        if not any(numbers[name] for name in IDLE):
            break
        await asyncio.sleep(0.1)
    return numbers


async def stress(url: str, arguments: argparse.Namespace) -> list[str]:
    """Returns what is wrong."""
    tally = Tally()
    client = openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=arguments.api_key, max_retries=0, timeout=300
    )
    async with client:
        model = (await client.models.list()).data[0].id
        warm_up = Tally()
        await many_clients(client, model, arguments, arguments.warm_up, warm_up)
        tally.errors += warm_up.errors
        before = await settle(client, url)
        start = time.monotonic()
        await many_clients(client, model, arguments, arguments.seconds, tally)
        seconds = time.monotonic() - start
        after = await settle(client, url)
    grown = after[RESIDENT] / before[RESIDENT] - 1
    print(
        f"{arguments.streams} streams for {seconds:.1f} s: {tally.finished} finished, "
        f"{tally.left} left early, {len(tally.errors)} errors, "
        f"{tally.pieces / seconds:.0f} events/s\n"
        f"memory {before[RESIDENT] / 1e6:.0f} MB, then {after[RESIDENT] / 1e6:.0f} MB "
        f"({grown:+.1%}); free KV pages {before[FREE]:.0f}, then {after[FREE]:.0f}"
    )
    wrong = [f"{tally.errors.count(text)} times: {text}" for text in sorted(set(tally.errors))]
    wrong += [f"{name} is {after[name]:.0f}" for name in IDLE if after[name]]
    if after[FREE] != before[FREE]:
        wrong.append(f"{before[FREE] - after[FREE]:.0f} KV pages did not come back")
    if grown > GROWTH:
        wrong.append(f"the server's memory grew by {grown:.1%}")
    if not tally.finished:
        wrong.append("no stream came to its end")
    return wrong


def main() -> None:
    arguments = parse_arguments()
    with server(arguments.url) as url:
        try:
            wrong = asyncio.run(stress(url, arguments))
        except openai.APIError as error:
            raise ValueError(f"the server at {url}: {error}") from error
    if wrong:
        sys.exit("\n".join(f"error: {text}" for text in wrong))


if __name__ == "__main__":
    command_line.run(main)
