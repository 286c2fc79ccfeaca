"""Records which experts a model uses on a text, for scripts/simulate.py --trace.

The text is cut into pieces that fit the KV cache; of each, the first tokens are a prompt and the
others are fed one by one, as in decoding.
"""

import argparse
from pathlib import Path

import command_line
import numpy as np

import moe_jax
from moe_jax.placement.trace import RoutingTrace, make_trace, save_trace


def join(traces: list[RoutingTrace]) -> RoutingTrace:
    """One trace after the other."""
    together = lambda name: np.concatenate([getattr(trace, name) for trace in traces])
    return make_trace(
        together("counts"),
        traces[0].experts_per_token,
        gates=together("gates").astype(np.float32),
        prefill=together("prefill"),
        layer=traces[0].layer,
    )


def describe(trace: RoutingTrace) -> str:
    """How evenly experts are used, and how often a token's experts were those of the one before."""
    decode = trace.counts[~trace.prefill] > 0
    use = decode.sum(axis=0)
    quarter = max(1, trace.experts // 4)
    busiest = np.sort(use, axis=1)[:, -quarter:].sum()
    again = (decode[1:] & decode[:-1]).sum()
    return (
        f"{trace.steps} steps ({int(trace.prefill.sum())} of prompts), {trace.layers} layers with "
        f"{trace.experts} experts, top-{trace.experts_per_token}\n"
        f"the busiest quarter of the experts of a layer does {percent(busiest, use.sum())} "
        f"of the work; {percent(again, decode[1:].sum())} of a token's experts served the token "
        "before"
    )


def percent(part: int, whole: int) -> str:
    """A share; "-" of nothing."""
    return f"{part / whole:.0%}" if whole else "-"


def read_text(path: str) -> str:
    """A file's text. Raises OSError, and ValueError for what is not UTF-8 or blank."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}; convert it, or give "
            "another --text"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is blank, nothing can be recorded on it; give another --text")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", nargs="?", help="a Hugging Face folder (default: the embedded model)")
    add("--text", default=argparse.__file__, help="a text file (default: argparse.py)")
    add("--out", default="routing.npz", help="file for the trace (routing.npz)")
    add("--tokens", type=int, default=2048, help="tokens to read at most (2048)")
    add("--piece", type=int, default=512, help="tokens of a piece (512)")
    add("--prompt", type=int, default=128, help="of which this many are its prompt (128)")
    arguments = parser.parse_args()
    if not 0 <= arguments.prompt < arguments.piece:
        raise ValueError(
            f"--prompt is {arguments.prompt}; choose 0 or more, less than --piece, which is "
            f"{arguments.piece}"
        )
    command_line.check_least(arguments, tokens=1)
    text, out = read_text(arguments.text), Path(arguments.out)
    if out.suffix != ".npz":
        raise ValueError(f"--out is {out}; choose a name that ends in .npz")
    out.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after the recording
    engine = moe_jax.load(arguments.checkpoint, max_tokens=arguments.piece, max_seqs=1)
    if engine.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer, so no text can be read; give another")
    tokens = list(engine.tokenizer.encode(text))[: arguments.tokens]
    pieces = [tokens[i : i + arguments.piece] for i in range(0, len(tokens), arguments.piece)]
    traces = []
    for number, piece in enumerate(pieces, 1):
        traces.append(engine.routing(piece, prompt_tokens=min(arguments.prompt, len(piece))))
        print(f"[{number}/{len(pieces)}] {len(piece)} tokens", flush=True)
    trace = join(traces)
    save_trace(trace, out)
    print(f"{describe(trace)}\nwritten to {out}")


if __name__ == "__main__":
    command_line.run(main)
