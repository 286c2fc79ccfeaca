"""Trains the reference model on the standard library's source, or measures a trained one.

python scripts/train_reference.py --out FOLDER --minutes 8
python scripts/train_reference.py --evaluate moe_jax/assets/reference_model
"""

import argparse
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.evaluate.compression import compress_with_model, compress_with_xz, token_nats
from moe_jax.evaluate.corpus import Document, pack_library, read_library, split_documents
from moe_jax.model.weights import ModelWeights
from moe_jax.training.batches import batches, leading_whitespace_splits
from moe_jax.training.export import export
from moe_jax.training.forward import forward
from moe_jax.training.restore import restore
from moe_jax.training.step import (
    Metrics,
    State,
    TrainingConfig,
    initial_weights,
    learning_rate,
    make_step,
)
from moe_jax.training.tokenizer import end_of_text_id, train_tokenizer

PROMPTS = (
    "def fibonacci(n):",
    "def read_lines(path, encoding=None):\n    ",
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n\ndef main(",
    "def ",
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=pathlib.Path, help="train, and write the model here")
    what.add_argument("--evaluate", type=pathlib.Path, help="measure the model in this folder")
    what.add_argument("--pack", type=pathlib.Path, help="write --corpus folders as one archive")
    what.add_argument("--curve", type=pathlib.Path, help="draw --log as a picture")
    add = parser.add_argument
    add("--log", type=pathlib.Path, help="the training.jsonl that --curve draws")
    add("--corpus", type=pathlib.Path, nargs="*", help="library folders or a packed archive")
    add("--xz", type=float, help="bits per byte of xz, for --curve")
    add("--minutes", type=float, default=65, help="wall-clock time for everything")
    add("--max-epochs", type=float, default=40, help="stop after so many passes over the text")
    add("--every", type=int, default=1, help="evaluate every n-th held-out file only")
    add("--tokens", type=int, default=8192, help="tokens in a batch")
    add("--positions", type=int, default=512, help="tokens in a sequence at first")
    add("--last-positions", type=int, default=1024, help="tokens in a sequence at the end")
    add("--last-part", type=float, default=0.2, help="part of the time that is the end")
    add("--peak", type=float, default=0.02, help="highest learning rate")
    add("--weight-decay", type=float, default=0.03, help="decay of matrices")
    add("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    add("--capacity", type=float, default=1.25, help="room in an expert over its fair share")
    add("--split", type=float, default=0.02, help="part of tokens whose whitespace is split off")
    add("--resume", type=pathlib.Path, help="the state.npz of an earlier run to go on from")
    add("--elapsed", type=float, default=0, help="minutes the run to go on from has had")
    add("--start", type=float, default=0, help="minutes before that run's first step")
    add("--reserve", type=float, default=1.0, help="minutes for the last measurement")
    add("--seed", type=int, default=0, help="weights and order of documents")
    add("--vocab", type=int, default=4096, help="entries of the tokenizer")
    add("--embed", type=int, default=256, help="width of the model")
    add("--layers", type=int, default=6, help="number of layers")
    add("--heads", type=int, default=4, help="query heads")
    add("--kv-heads", type=int, default=2, help="key and value heads")
    add("--head-dim", type=int, default=64, help="width of a head")
    add("--experts", type=int, default=8, help="experts in every layer, two per token")
    add("--ffn", type=int, default=256, help="hidden width of an expert")
    return parser.parse_args()


def model_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        family="qwen3_moe",
        vocab=args.vocab,
        embed=args.embed,
        dense_ffn=4 * args.embed,
        attention=AttentionConfig(
            heads=args.heads, kv_heads=args.kv_heads, head_dim=args.head_dim, qk_norm="head"
        ),
        moe=MoEConfig(num_experts=args.experts, experts_per_token=2, ffn=args.ffn),
        rope=RopeConfig(),
        moe_layers=(True,) * args.layers,
        windows=(None,) * args.layers,
        max_positions=2048,
        tied_embeddings=True,
    )


def make_score(config: ModelConfig) -> Callable[..., tuple]:
    """A jitted function from weights, inputs and targets to nats and the experts' shares."""

    @nnx.jit
    def score(weights: ModelWeights, inputs: jax.Array, targets: jax.Array) -> tuple:
        outputs = forward(weights, config, inputs, dtype=jnp.bfloat16)
        return token_nats(outputs.logits, targets), outputs.shares

    return score


def bits_per_byte(
    weights: ModelWeights,
    score: Callable[..., tuple],
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    context: int,
    seqs: int,
) -> tuple[float, np.ndarray]:
    """Bits per byte of the documents, and the experts' shares [layers, experts] over them."""
    shares = []

    def nats(inputs: np.ndarray, targets: np.ndarray) -> jax.Array:
        scored, share = score(weights, inputs, targets)
        shares.append(share)
        return scored

    result = compress_with_model(
        nats,
        documents,
        lambda text: tokenizer.encode(text).ids,
        end_of_text=end_of_text_id(tokenizer),
        context=context,
        seqs=seqs,
    )
    return result.bits_per_byte, np.mean(jax.device_get(shares), axis=0)


def save_state(state: State, folder: pathlib.Path) -> None:
    """Writes what `--resume` needs, under another name first."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    partial = folder / "state.partial.npz"
    np.savez(partial, *leaves)
    partial.rename(folder / "state.npz")


def load_state(state: State, file: pathlib.Path) -> State:
    """A saved state of the same shape."""
    with np.load(file) as saved:
        leaves = [jnp.asarray(saved[name]) for name in saved.files]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def train(args: argparse.Namespace) -> None:
    began = time.monotonic() - 60 * args.elapsed
    minutes = lambda: (time.monotonic() - began) / 60
    config = model_config(args)
    training, held_out = split_documents(read_library(*(args.corpus or [])[:1]))
    sample = held_out[::24]
    tokenizer = train_tokenizer([d.text for d in training], args.vocab)
    end = end_of_text_id(tokenizer)
    encoded = tokenizer.encode_batch_fast([d.text for d in training])
    documents = [np.asarray([*e.ids, end], np.int32) for e in encoded]
    epoch_tokens = sum(d.size for d in documents)
    size = sum(d.size for d in training)
    print(
        f"{len(training)} files, {size} bytes, {epoch_tokens} tokens for training; "
        f"{len(held_out)} files, {sum(d.size for d in held_out)} bytes held out; "
        f"{minutes():.2f} minutes so far",
        flush=True,
    )
    settings = TrainingConfig(
        balance=args.balance, weight_decay=args.weight_decay, capacity=args.capacity
    )
    weights = initial_weights(config, args.seed)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(weights)))
    state, step, weights_of = make_step(config, settings, weights)
    if args.resume:
        state = load_state(state, args.resume)
    score = make_score(config)
    print(f"{count} parameters on {jax.devices()[0]}, jax {jax.__version__}", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "training.jsonl").open("a" if args.resume else "w")
    header = {"settings": dataclasses.asdict(settings), "model": dataclasses.asdict(config)}
    header |= {"arguments": vars(args), "parameters": count, "epoch_tokens": epoch_tokens}
    header |= {"device": str(jax.devices()[0].device_kind), "training_bytes": size}
    header |= {"jax": jax.__version__, "sample_bytes": sum(d.size for d in sample)}
    if not args.resume:
        log.write(json.dumps(header, default=str) + "\n")

    def report(state: State, steps: int, window: list[Metrics], measure: bool) -> None:
        nats = float(np.mean([m.nats for m in window]))
        if not math.isfinite(nats):
            raise FloatingPointError(f"the loss is {nats} after {steps} steps; lower --peak")
        shares = np.mean([m.shares for m in window], axis=0) * config.moe.num_experts
        line = {
            "step": steps,
            "minutes": round(minutes(), 3),
            "epochs": round(steps * args.tokens / epoch_tokens, 3),
            "loss": round(nats, 4),
            "training_bits_per_byte": round(nats * epoch_tokens / size / math.log(2), 4),
            "least_share": round(float(shares.min()), 3),
            "most_share": round(float(shares.max()), 3),
        }
        if measure:
            bits, _ = bits_per_byte(weights_of(state), score, sample, tokenizer, 1024, 4)
            line["held_out_bits_per_byte"] = round(bits, 4)
        log.write(json.dumps(line) + "\n")
        log.flush()
        print(json.dumps(line), flush=True)

    pairs = leading_whitespace_splits(tokenizer.get_vocab())

    def rows_of(positions: int, seed: int) -> Iterator[np.ndarray]:
        return batches(
            documents,
            seqs=args.tokens // positions,
            length=positions + 1,
            pairs=pairs,
            part=args.split,
            seed=seed,
        )

    rows, late = rows_of(args.positions, args.seed + int(state.step)), False
    max_steps = args.max_epochs * epoch_tokens / args.tokens
    # The first step compiles; the end needs time for a last measurement and the export.
    state, metrics = step(state, next(rows), jnp.float32(0))
    jax.block_until_ready(metrics)
    start = args.start if args.resume else minutes()
    reserve = args.reserve
    if start + reserve >= args.minutes:
        raise SystemExit(f"{start:.1f} minutes went by before training; raise --minutes")
    print(f"training starts at {start:.2f} minutes", flush=True)
    steps, window, reported, saved = int(state.step) - 1, [], minutes(), minutes()
    while True:
        progress = max((minutes() - start) / (args.minutes - reserve - start), steps / max_steps)
        if progress >= 1:
            break
        if progress > 1 - args.last_part and not late:
            rows, late = rows_of(args.last_positions, args.seed + 1), True
        rate = jnp.float32(learning_rate(progress, args.peak))
        state, metrics = step(state, next(rows), rate)
        window.append(metrics)
        steps += 1
        if steps % 2 == 0:
            jax.block_until_ready(metrics)
        if minutes() - reported > args.minutes / 100:
            window = jax.device_get(window)
            keep = minutes() - saved > args.minutes / 12
            report(state, steps, window, measure=keep)
            window, reported = [], minutes()
            if keep:
                saved = reported
                export(weights_of(state), config, tokenizer, args.out)
                save_state(state, args.out)
    export(weights_of(state), config, tokenizer, args.out)
    save_state(state, args.out)
    report(state, steps, jax.device_get(window or [metrics]), measure=True)
    log.close()
    print(f"done after {minutes():.2f} minutes and {steps} steps", flush=True)


def continuation(
    weights: ModelWeights, config: ModelConfig, tokenizer: Tokenizer, prompt: str, tokens: int
) -> str:
    """The most probable continuation of a prompt, without a cache."""
    ids = tokenizer.encode(prompt).ids
    context = len(ids) + tokens

    @nnx.jit
    def following(weights: ModelWeights, row: jax.Array, last: jax.Array) -> jax.Array:
        logits = forward(weights, config, row[None], dtype=jnp.bfloat16).logits
        return logits[0, last].argmax()

    row = np.full(context, end_of_text_id(tokenizer), np.int32)
    row[: len(ids)] = ids
    for place in range(len(ids), context):
        row[place] = following(weights, jnp.asarray(row), jnp.int32(place - 1))
        if row[place] == end_of_text_id(tokenizer):
            break
    return tokenizer.decode(row[: place + 1].tolist(), skip_special_tokens=True)


def evaluate(args: argparse.Namespace) -> None:
    weights, config = restore(args.evaluate)
    tokenizer = Tokenizer.from_file(str(args.evaluate / "tokenizer.json"))
    _, held_out = split_documents(read_library(*(args.corpus or [])[:1]))
    held_out = held_out[:: args.every]
    size = sum(d.size for d in held_out)
    print(f"{len(held_out)} held-out files, {size} bytes")
    for name, solid in (("xz -9e, each file alone", False), ("xz -9e, all files as one", True)):
        print(f"{name:28}{compress_with_xz(held_out, solid=solid).bits_per_byte:8.4f} bits/byte")
    score = make_score(config)
    bits, shares = bits_per_byte(weights, score, held_out, tokenizer, 1024, 4)
    print(f"{'the model':28}{bits:8.4f} bits/byte")
    fair = shares * config.moe.num_experts
    for layer, row in enumerate(fair):
        print(f"layer {layer}: experts' use over fair share {row.min():.2f} to {row.max():.2f}")
    for prompt in PROMPTS:
        print("-" * 80)
        print(continuation(weights, config, tokenizer, prompt, 64))


def main() -> None:
    args = parse()
    if args.pack:
        print(f"{pack_library(args.corpus, args.pack)} bytes written to {args.pack}")
    elif args.curve:
        # Only this needs matplotlib.
        from moe_jax.training.curve import draw_curve  # noqa: PLC0415

        draw_curve(args.log, args.curve, args.xz)
    elif args.evaluate:
        evaluate(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
