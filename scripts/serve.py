"""Serves a model to OpenAI's clients: /v1/completions and /v1/chat/completions.

Without arguments: the embedded reference model, for this machine only, at http://127.0.0.1:8000/v1.
Stops with grace at Ctrl-C and SIGTERM. Needs the extra `serve`.
"""

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

import command_line

import moe_jax
from moe_jax.engine.load import reference_model_folder
from moe_jax.engine.sizing import device_memory_for

try:
    from moe_jax.server import Limits, make_app, make_server
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; pip install 'moe-jax[serve]'")

LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEY_VARIABLE = "MOE_JAX_API_KEY"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    limits = Limits()
    add = parser.add_argument
    add("--model", metavar="FOLDER", help="Hugging Face or saved folder (default: embedded model)")
    add("--name", help="the model's name for clients (default: its folder's)")
    add("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    add("--port", type=int, default=8000, help="0 takes a free one (8000)")
    add("--api-key", help=f"what clients must send; better in {KEY_VARIABLE}, which ps hides")
    add("--device-memory", metavar="SIZE", help='device budget such as "24GiB"')
    add("--host-memory", metavar="SIZE", help="budget for experts in host memory (default: all)")
    add("--dtype", default="bfloat16", help="bfloat16 or float32 (default: bfloat16)")
    add("--capacity", type=int, default=16384, metavar="N", help="KV cache, in tokens (16384)")
    add("--max-seqs", type=int, default=16, metavar="N", help="sequences that run together (16)")
    add("--missing-experts", default="auto", help="auto, stream or host (default: auto)")
    add(
        "--max-open",
        type=int,
        default=limits.sequences,
        metavar="N",
        help=f"sequences, running or waiting, before clients get 429 ({limits.sequences})",
    )
    add(
        "--max-body",
        type=int,
        default=limits.body_bytes,
        metavar="BYTES",
        help=f"largest body of a request ({limits.body_bytes})",
    )
    add(
        "--chat-tokens",
        type=int,
        default=limits.chat_tokens,
        metavar="N",
        help=f"length of a chat answer where the request does not say ({limits.chat_tokens})",
    )
    add(
        "--drain-seconds",
        type=float,
        default=limits.drain_seconds,
        metavar="S",
        help=f"how long running requests may go on at the end ({limits.drain_seconds:g})",
    )
    add("--quiet", action="store_true", help="do not log every request")
    return parser.parse_args()


def bind(host: str, port: int) -> socket.socket:
    """Takes the address before the model is loaded, which may take minutes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen at {host} port {port}: {error}; give another") from error
    return listener


def load(arguments: argparse.Namespace) -> moe_jax.Engine:
    budget = arguments.device_memory
    if arguments.model is None and budget is None:
        budget = device_memory_for(
            reference_model_folder(),
            experts=0.5,
            dtype=arguments.dtype,
            max_tokens=arguments.capacity,
        )
    return moe_jax.load(
        arguments.model,
        device_memory=budget,
        host_memory=arguments.host_memory,
        dtype=arguments.dtype,
        max_tokens=arguments.capacity,
        max_seqs=arguments.max_seqs,
        missing_experts=arguments.missing_experts,
    )


def main() -> None:
    arguments = parse_arguments()
    # While it serves, the server hears signals; it raises them again when it has stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    key = arguments.api_key or os.environ.get(KEY_VARIABLE)
    name = arguments.name or Path(arguments.model or reference_model_folder()).resolve().name
    limits = Limits(
        sequences=arguments.max_open,
        body_bytes=arguments.max_body,
        chat_tokens=arguments.chat_tokens,
        drain_seconds=arguments.drain_seconds,
    )
    with bind(arguments.host, arguments.port) as listener:
        engine = load(arguments)
        app = make_app(engine, model=name, api_key=key, limits=limits)
        print(engine.plan, end="\n\n")
        if key is None and arguments.host not in LOOPBACK:
            print("warning: whoever reaches this address may use it; set an API key")
        host, port = listener.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        where = f"{name} is served at http://{address}:{port}/v1"
        ready = lambda: print(where, flush=True)
        make_server(app, on_ready=ready, access_log=not arguments.quiet).run([listener])


if __name__ == "__main__":
    command_line.run(main)
