"""Records which experts a model uses on a text, for scripts/simulate.py --trace.

The text is cut into pieces that fit the KV cache; of each, the first tokens are a prompt and the
others are fed one by one, as in decoding.
"""

import argparse
from pathlib import Path

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
    use = decode.mean(axis=0)
    quarter = max(1, trace.experts // 4)
    busiest = np.sort(use, axis=1)[:, -quarter:].sum() / use.sum()
    again = (decode[1:] & decode[:-1]).sum() / decode[1:].sum()
    return (
        f"{trace.steps} steps ({int(trace.prefill.sum())} of prompts), {trace.layers} layers with "
        f"{trace.experts} experts, top-{trace.experts_per_token}\n"
        f"the busiest quarter of the experts of a layer does {busiest:.0%} of the work; "
        f"{again:.0%} of a token's experts served the token before"
    )


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
        parser.error(f"--prompt {arguments.prompt} must be less than --piece {arguments.piece}")
    engine = moe_jax.load(arguments.checkpoint, max_tokens=arguments.piece, max_seqs=1)
    if engine.tokenizer is None:
        parser.error("the checkpoint has no tokenizer, so no text can be read with it")
    text = Path(arguments.text).read_text(encoding="utf-8")
    tokens = list(engine.tokenizer.encode(text))[: arguments.tokens]
    pieces = [tokens[i : i + arguments.piece] for i in range(0, len(tokens), arguments.piece)]
    traces = []
    for number, piece in enumerate(pieces, 1):
        traces.append(engine.routing(piece, prompt_tokens=min(arguments.prompt, len(piece))))
        print(f"[{number}/{len(pieces)}] {len(piece)} tokens", flush=True)
    trace = join(traces)
    save_trace(trace, arguments.out)
    print(f"{describe(trace)}\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
