"""Trains the reference model on the standard library's source and on tasks that need the context.

python scripts/train_reference.py --out FOLDER --steps 6000
python scripts/train_reference.py --out FOLDER --steps 6000       (again: goes on where it stopped)
python scripts/train_reference.py --evaluate moe_jax/assets/reference_model
"""

import argparse
import dataclasses
import json
import math
import pathlib
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import command_line
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from host_offload.whole_file import write_whole_file
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.evaluate.compression import compress_with_model, compress_with_xz, target_nats
from moe_jax.evaluate.corpus import Document, pack_library, read_library, split_documents
from moe_jax.evaluate.routing import LayerRouting, RoutingSums, describe_routing, sum_routing
from moe_jax.evaluate.training_rows import ANSWER, MIXES, TrainingText, step_rows
from moe_jax.model.weights import ModelWeights
from moe_jax.training.export import export
from moe_jax.training.forward import forward
from moe_jax.training.restore import restore, restore_mean
from moe_jax.training.saved_state import SavedStates
from moe_jax.training.step import State, TrainingConfig, initial_weights, learning_rate, make_step
from moe_jax.training.tokenizer import end_of_text_id, train_tokenizer
from moe_jax.training.whitespace import leading_whitespace_splits


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    add(
        "--start-from",
        type=pathlib.Path,
        nargs="+",
        help="trained folders, the mean of whose weights to start with",
    )
    add("--steps", type=int, default=6000, help="steps in all (6000); 0: only write that mean")
    add("--every", type=int, default=1, help="evaluate every n-th held-out file only")
    add("--tokens", type=int, default=8192, help="tokens in a step (8192)")
    add("--rows", choices=MIXES, default="all", help="what rows are made of (all); far: the end")
    add("--peak", type=float, default=0.015, help="highest learning rate (0.015)")
    add("--decay", type=float, default=0.35, help="last part of the steps: the rate falls (0.35)")
    add("--weight-decay", type=float, default=0.03, help="decay of matrices (0.03)")
    add("--balance", type=float, default=0.01, help="weight of the load-balancing loss (0.01)")
    add("--capacity", type=float, default=1.25, help="room in an expert over its share (1.25)")
    add("--split", type=float, default=0.02, help="part of tokens whose whitespace is split off")
    add("--report-every", type=int, default=25, help="steps between lines of the log (25)")
    add("--save-every", type=int, default=200, help="steps between saved states (200)")
    add("--seed", type=int, default=0, help="weights and rows")
    add("--vocab", type=int, default=4096, help="entries of the tokenizer (4096)")
    add("--embed", type=int, default=256, help="width of the model (256)")
    add("--layers", type=int, default=6, help="number of layers (6)")
    add("--heads", type=int, default=4, help="query heads (4)")
    add("--kv-heads", type=int, default=2, help="key and value heads (2)")
    add("--head-dim", type=int, default=64, help="width of a head (64)")
    add("--experts", type=int, default=8, help="experts in every layer, two per token (8)")
    add("--ffn", type=int, default=256, help="hidden width of an expert (256)")
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
        max_positions=4096 + 512,
        tied_embeddings=True,
    )


def make_score(config: ModelConfig, end_of_text: int) -> Callable[..., tuple]:
    """A jitted function from weights, inputs and targets to nats and sums of the routing."""

    @nnx.jit
    def score(weights: ModelWeights, inputs: jax.Array, targets: jax.Array) -> tuple:
        outputs = forward(weights, config, inputs, dtype=jnp.bfloat16)
        # Windows are filled up with ends of text.
        routing = sum_routing(
            outputs.probabilities, inputs != end_of_text, config.moe.experts_per_token
        )
        return target_nats(outputs.logits, targets), routing

    return score


def bits_per_byte(
    weights: ModelWeights,
    score: Callable[..., tuple],
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    context: int,
    seqs: int,
) -> tuple[float, list[LayerRouting]]:
    """Bits per byte of the documents, and the routing of each layer over them."""
    routing: list[RoutingSums] = []

    def nats(inputs: np.ndarray, targets: np.ndarray) -> jax.Array:
        scored, sums = score(weights, inputs, targets)
        routing.append(sums)
        return scored

    result = compress_with_model(
        nats,
        documents,
        lambda text: tokenizer.encode(text).ids,
        end_of_text=end_of_text_id(tokenizer),
        context=context,
        seqs=seqs,
    )
    return result.bits_per_byte, describe_routing(routing)


class Log:
    """Adds up what steps measured and writes a line of JSON now and then."""

    def __init__(self, file: pathlib.Path, bytes_per_token: float, fair: int):
        self._file, self._bytes_per_token, self._fair = file, bytes_per_token, fair
        self._clear()

    def _clear(self) -> None:
        self._nats: dict[str, list[float]] = defaultdict(list)
        self._shares: list[np.ndarray] = []
        self._began = time.monotonic()

    def add(self, nats: np.ndarray, importance: np.ndarray, shares: np.ndarray) -> None:
        for name, weight in (("text", 1.0), ("answer", ANSWER)):
            chosen = importance == weight
            if chosen.any():
                self._nats[name].append(float(nats[chosen].mean()))
        self._shares.append(shares)

    def write(self, step: int, **more: float) -> None:
        mean = {name: float(np.mean(values)) for name, values in self._nats.items()}
        if not all(map(math.isfinite, mean.values())):
            raise FloatingPointError(f"the loss is {mean} after {step} steps; lower --peak")
        shares = np.mean(self._shares, axis=0) * self._fair
        text_bits = mean.get("text", math.nan) / math.log(2) / self._bytes_per_token
        line = {
            "step": step,
            "seconds_per_step": round((time.monotonic() - self._began) / len(self._shares), 3),
            "training_bits_per_byte": round(text_bits, 4),
            "answer_nats": round(mean.get("answer", math.nan), 4),
            "least_share": round(float(shares.min()), 3),
            "most_share": round(float(shares.max()), 3),
            **more,
        }
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        self._clear()


def take_up(log: pathlib.Path, last: int, header: dict) -> None:
    """Takes out of the log what was done after step `last`, and adds other settings if there are.

    Raises ValueError for a setting that decides what the steps before were made of.
    """
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kept = [line for line in lines if line.get("step", 0) <= last]
    header = json.loads(json.dumps(header, default=str))
    before = [line for line in kept if "settings" in line][-1]
    for name in ("seed", "tokens", "corpus"):
        was, now = (one["arguments"][name] for one in (before, header))
        if was != now:
            raise ValueError(
                f"the run in {log.parent} was begun with --{name} {was}, not {now}; give that, or "
                "train into another folder"
            )
    kept += [header] if header != before else []
    write_whole_file(log, "".join(f"{json.dumps(line)}\n" for line in kept).encode())


def train(args: argparse.Namespace) -> None:
    config = model_config(args)
    training, held_out = split_documents(read_library(*(args.corpus or [])[:1]))
    sample = held_out[::24]
    if args.start_from:
        tokenizer = Tokenizer.from_file(str(args.start_from[0] / "tokenizer.json"))
        weights, _ = restore_mean(args.start_from)
    else:
        tokenizer = train_tokenizer([d.text for d in training], args.vocab)
        weights = initial_weights(config, args.seed)
    end = end_of_text_id(tokenizer)
    encoded = tokenizer.encode_batch_fast([d.text for d in training])
    text = TrainingText(
        tokens=np.concatenate([np.asarray([*e.ids, end], np.int32) for e in encoded]),
        encode=lambda part: tokenizer.encode(part).ids,
        end_of_text=end,
        splits=leading_whitespace_splits(tokenizer.get_vocab()),
        split_part=args.split,
    )
    size = sum(d.size for d in training)
    settings = TrainingConfig(
        balance=args.balance, weight_decay=args.weight_decay, capacity=args.capacity
    )
    state, step, weights_of = make_step(config, settings, weights)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(weights)))
    score = make_score(config, end)
    args.out.mkdir(parents=True, exist_ok=True)
    states = SavedStates(args.out / "states")
    saved = states.newest(state)
    state = saved or state
    header = {"settings": dataclasses.asdict(settings), "model": dataclasses.asdict(config)}
    header |= {"arguments": vars(args), "parameters": count, "epoch_tokens": text.tokens.size}
    header |= {"device": str(jax.devices()[0].device_kind), "training_bytes": size}
    header |= {"jax": jax.__version__, "sample_bytes": sum(d.size for d in sample)}
    log_file = args.out / "training.jsonl"
    if saved is None:
        log_file.write_text(json.dumps(header, default=str) + "\n")
    else:
        take_up(log_file, int(state.step), header)
    print(json.dumps(header, default=str), f"from step {int(state.step)}", flush=True)

    def keep(state: State) -> float:
        states.save(state)
        export(weights_of(state), config, tokenizer, args.out)
        return bits_per_byte(weights_of(state), score, sample, tokenizer, 1024, 4)[0]

    if args.steps == 0:
        keep(state)
    log = Log(log_file, size / text.tokens.size, config.moe.num_experts)
    for done in range(int(state.step), args.steps):
        rows, importance = step_rows(text, args.tokens, args.seed, done, MIXES[args.rows])
        rate = learning_rate(done / args.steps, args.peak, warm_up=0.01, decay=args.decay)
        state, metrics = step(state, rows, importance, jnp.float32(rate))
        log.add(np.asarray(metrics.nats), importance, np.asarray(metrics.shares))
        last = done + 1 == args.steps
        if last or (done + 1) % args.save_every == 0:
            log.write(done + 1, held_out_bits_per_byte=round(keep(state), 4))
        elif (done + 1) % args.report_every == 0:
            log.write(done + 1)
    states.close()


def evaluate(args: argparse.Namespace) -> None:
    weights, config = restore(args.evaluate)
    tokenizer = Tokenizer.from_file(str(args.evaluate / "tokenizer.json"))
    _, held_out = split_documents(read_library(*(args.corpus or [])[:1]))
    held_out = held_out[:: args.every]
    size = sum(d.size for d in held_out)
    print(f"{len(held_out)} held-out files, {size} bytes")
    for name, solid in (("xz -9e, each file alone", False), ("xz -9e, all files as one", True)):
        print(f"{name:28}{compress_with_xz(held_out, solid=solid).bits_per_byte:8.4f} bits/byte")
    score = make_score(config, end_of_text_id(tokenizer))
    bits, routing = bits_per_byte(weights, score, held_out, tokenizer, 1024, 4)
    print(f"{'the model':28}{bits:8.4f} bits/byte")
    for layer, described in enumerate(routing):
        print(f"layer {layer}: {described}")


def main() -> None:
    args = parse()
    if args.steps < (0 if args.start_from else 1):
        raise ValueError(f"--steps {args.steps} trains nothing; give 1 or more, or --start-from")
    if args.pack and not args.corpus:
        raise ValueError("--pack packs the folders of --corpus; give them")
    if not args.pack and len(args.corpus or []) > 1:
        raise ValueError("--corpus takes several folders only with --pack; pack them first")
    if args.curve and not args.log:
        raise ValueError("--curve draws a log; name it with --log")
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
    command_line.run(main)
