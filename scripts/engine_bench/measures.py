"""What the engine's scheduling is worth: one function per line of the benchmark's table.

Each takes a loaded engine, runs both sides alternately after a warm-up of each, and returns rows.
Knows tokens and clocks, not checkpoints.
"""

import statistics
import time

import numpy as np
from engine_bench.comparing import Row, Sizes, Texts, alternate, medians
from engine_bench.step_parts import StepParts

import moe_jax


def concurrency(engine: moe_jax.Engine, sizes: Sizes) -> list[Row]:
    """Requests together against the same number one at a time: tokens per second."""
    texts = Texts(engine)
    options = {"max_tokens": sizes.tokens, "ignore_eos": True}
    total = sizes.together * sizes.tokens

    def together() -> float:
        prompts = texts.several(sizes.together, sizes.prompt)
        began = time.perf_counter()
        engine.generate(prompts, **options)
        return total / (time.perf_counter() - began)

    def alone() -> float:
        prompts = texts.several(sizes.together, sizes.prompt)
        began = time.perf_counter()
        for prompt in prompts:
            engine.generate(prompt, **options)
        return total / (time.perf_counter() - began)

    names = {"alone tokens/s": alone, "together tokens/s": together}
    runs = alternate(sizes.repeats, **names)
    found = medians(runs)
    ratio = found["together tokens/s"] / found["alone tokens/s"]
    name = f"{sizes.together} requests together"
    return [Row(name, found, ratio, target=4.0, runs=runs)]


def beams(engine: moe_jax.Engine, sizes: Sizes) -> list[Row]:
    """A step of a beam search against a step of greedy decoding."""
    texts = Texts(engine)
    steps = sizes.beam_tokens - 1

    def step_ms(width: int) -> float:
        before = engine.stats
        engine.generate(
            texts.take(sizes.prompt),
            max_tokens=sizes.beam_tokens,
            num_beams=width,
            ignore_eos=True,
        )
        return 1e3 * engine.stats.since(before).decode_seconds / steps

    widths = {f"{width} beams ms": lambda width=width: step_ms(width) for width in sizes.beams}
    runs = alternate(sizes.repeats, **{"greedy ms": lambda: step_ms(1)}, **widths)
    found = medians(runs)
    return [
        Row(
            f"step of {width} beams",
            {name: found[name] for name in ("greedy ms", f"{width} beams ms")},
            found[f"{width} beams ms"] / found["greedy ms"],
            target=3.6 if width == 8 else None,
            at_least=False,
            runs=runs,
        )
        for width in sizes.beams
    ]


def chunked_prefill(engine: moe_jax.Engine, sizes: Sizes) -> list[Row]:
    """What decoding requests wait for while a long prompt is prefilled beside them."""
    texts = Texts(engine)
    names = ("decode ms", "whole chunk ms", "longest gap ms")
    runs: dict[str, list[float]] = {name: [] for name in names}
    most_steps = 0
    options = {"max_tokens": sizes.tokens, "ignore_eos": True}
    for repeat in range(sizes.repeats + 1):
        short = texts.several(sizes.decoding, sizes.prompt)
        handles = [engine.submit(prompt, **options) for prompt in short]
        for handle in handles * 4:
            handle.next_piece()
        long = engine.submit(texts.take(sizes.long_prompt), **options)
        parts, moments, steps = StepParts(), [time.perf_counter()], [0]
        filling = 0  # steps until the long prompt was done
        with parts.watch(engine):
            while not filling or len(steps) < filling + 9:
                if handles[0].done:
                    raise ValueError(
                        f"requests of {sizes.tokens} tokens end before a prompt of "
                        f"{sizes.long_prompt} is read beside them; give more --tokens"
                    )
                for handle in handles:  # the first one's next piece is made by a step, for all
                    handle.next_piece()
                moments.append(time.perf_counter())
                steps.append(len(parts.steps))
                if not filling and long.generated_tokens:
                    filling = len(parts.steps)
        for handle in (*handles, long):
            handle.cancel()
        if not repeat:
            continue
        seconds = [step["step"] for step in parts.steps]
        most_steps = max(most_steps, int(np.diff(steps).max()))
        runs["decode ms"].append(1e3 * statistics.median(seconds[filling:]))
        runs["whole chunk ms"].append(1e3 * statistics.median(seconds[:filling]))
        runs["longest gap ms"].append(1e3 * float(np.diff(moments).max()))
    return [
        Row(
            f"prompt of {sizes.long_prompt} beside {sizes.decoding} that decode",
            medians(runs),
            most_steps,
            unit="steps at most between two tokens",
            target=1,
            at_least=False,
            runs=runs,
        )
    ]


def bookkeeping(engine: moe_jax.Engine, sizes: Sizes) -> list[Row]:
    """What a step takes beside the model, with as many running requests as there are seats."""
    texts = Texts(engine)
    rows = []
    for waiting in (0, sizes.running):
        parts = StepParts()

        def run(waiting=waiting) -> None:
            ends = np.random.default_rng(2).integers(sizes.tokens // 2, sizes.tokens, waiting)
            lengths = [sizes.tokens] * sizes.running if not waiting else [*ends, *ends[::-1]]
            handles = [
                engine.submit(texts.take(sizes.prompt), max_tokens=int(length), ignore_eos=True)
                for length in lengths
            ]
            for handle in handles:
                handle.result()

        run()
        with parts.watch(engine):
            for _ in range(sizes.repeats):
                run()
        steps = [step for step in parts.steps if step["requests"] == sizes.running]
        runs = {
            "scheduling ms": [1e3 * step["scheduling"] for step in steps],
            "step but model ms": [1e3 * (step["step"] - step["model"]) for step in steps],
            "step ms": [1e3 * step["step"] for step in steps],
        }
        measured = medians(runs)
        high = float(np.percentile(runs["scheduling ms"], 95))
        name = f"scheduling of {sizes.running} that run" + f", {waiting} wait" * bool(waiting)
        rows.append(
            Row(
                name,
                measured | {"scheduling ms, 95 %": high},
                measured["scheduling ms"],
                unit="ms",
                target=1.0,
                at_least=False,
            )
        )
    return rows


def shared_prefix(engine: moe_jax.Engine, sizes: Sizes) -> list[Row]:
    """Time to the first token of a prompt whose beginning was, or was not, computed before."""
    texts = Texts(engine)
    runs: dict[str, list[float]] = {"cold ms": [], "hit ms": []}
    cached = 0
    for _ in range(sizes.repeats + 1):
        shared = texts.take(sizes.shared)
        for times in runs.values():
            done = engine.generate([*shared, *texts.take(16)], max_tokens=1, ignore_eos=True)
            times.append(1e3 * done.timing.first_token)
            cached = done.cached_tokens
    runs = {name: times[1:] for name, times in runs.items()}
    found = medians(runs)
    ratio = found["cold ms"] / found["hit ms"]
    name = f"first token, {sizes.shared} shared tokens ({cached} from the cache)"
    return [Row(name, found, ratio, target=5.0, runs=runs)]


def prompt_lookup(engine: moe_jax.Engine, sizes: Sizes) -> list[Row]:
    """Greedy decoding with and without drafts from the text itself."""
    text = repetitive(engine, Texts(engine).take(sizes.prompt // 2))
    tokens_of: dict[int, tuple[int, ...]] = {}
    steps_of: dict[int, int] = {}

    def rate(drafts: int) -> float:
        parts = StepParts()
        with parts.watch(engine):
            done = engine.generate(
                text, max_tokens=sizes.lookup_tokens, prompt_lookup=drafts, ignore_eos=True
            )
        tokens_of[drafts], steps_of[drafts] = done.tokens, len(parts.steps)
        return (len(done.tokens) - 1) / (done.timing.total - done.timing.first_token)

    names = {"without tokens/s": lambda: rate(0), "with tokens/s": lambda: rate(sizes.lookup)}
    runs = alternate(sizes.repeats, **names)
    found = medians(runs)
    ratio = found["with tokens/s"] / found["without tokens/s"]
    found["tokens per step"] = len(tokens_of[sizes.lookup]) / steps_of[sizes.lookup]
    found["same tokens"] = float(tokens_of[0] == tokens_of[sizes.lookup])
    return [Row(f"prompt lookup, {sizes.lookup} drafts", found, ratio, runs=runs)]


def repetitive(engine: moe_jax.Engine, phrase: list[int]) -> list[int]:
    """A text that says the same again and again: code, where the model can read."""
    if engine.tokenizer is None:
        return phrase * 6
    lines = [
        f"    def test_{name}(self):\n        self.assertEqual(int('{i}'), {i})\n\n"
        for i, name in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven"))
    ]
    return engine.tokenizer.encode("class IntTest(unittest.TestCase):\n\n" + "".join(lines))
