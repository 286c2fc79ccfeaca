"""Writes text with a Mixture-of-Experts model that is bigger than the device budget.

Without arguments: the embedded reference model, with room for about half of its experts.
"""

import argparse

import command_line

import moe_jax
from moe_jax.engine.load import reference_model_folder
from moe_jax.engine.sizing import device_memory_for

PROMPT = 'def read_lines(path):\n    """Return the lines of a text file'


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prompt", nargs="?", default=PROMPT, help="text to continue (default: a Python function)")
    add("--model", metavar="FOLDER", help="Hugging Face or saved folder (default: embedded model)")
    add(
        "--device-memory", metavar="SIZE", help='device budget such as "24GiB" (default: see above)'
    )
    add("--host-memory", metavar="SIZE", help="budget for experts in host memory (default: all)")
    add("--dtype", default="bfloat16", help="bfloat16 or float32 (default: bfloat16)")
    add("--capacity", type=int, default=4096, metavar="N", help="KV cache, in tokens (4096)")
    add("--missing-experts", default="auto", help="auto, stream or host (default: auto)")
    add("--max-tokens", type=int, default=96, metavar="N", help="tokens to generate (96)")
    add("--temperature", type=float, default=0.7, help="0 is greedy (0.7)")
    add("--top-k", type=int, help="sample among the k likeliest tokens")
    add("--top-p", type=float, default=0.9, help="sample within this probability mass (0.9)")
    add("--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest")
    add("--repetition-penalty", type=float, default=1.0, help="above 1 discourages repeats")
    add("--seed", type=int, default=3, help="seed of the sampling (3)")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before this text")
    add("--chat", action="store_true", help="send the prompt as a chat message")
    add("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    budget = arguments.device_memory
    if arguments.model is None and budget is None:
        budget = device_memory_for(
            reference_model_folder(),
            experts=0.5,
            dtype=arguments.dtype,
            max_tokens=arguments.capacity,
        )
    engine = moe_jax.load(
        arguments.model,
        device_memory=budget,
        host_memory=arguments.host_memory,
        dtype=arguments.dtype,
        max_tokens=arguments.capacity,
        missing_experts=arguments.missing_experts,
    )
    print(engine.plan, end="\n\n")
    chat = [{"role": "user", "content": arguments.prompt}]
    prompt = chat if arguments.chat else arguments.prompt
    options = {
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "min_p": arguments.min_p,
        "repetition_penalty": arguments.repetition_penalty,
        "seed": arguments.seed,
        "stop": tuple(arguments.stop),
        "ignore_eos": arguments.ignore_eos,
    }
    moe_jax.SamplingParams(**options)  # refuses bad options before anything is printed
    engine.generate(prompt, **options | {"max_tokens": 2})  # compiles; not in the figures below
    before = engine.stats
    if not arguments.chat:
        print(arguments.prompt, end="", flush=True)
    pieces = engine.stream(prompt, **options)
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print(f"\n\n{engine.stats.since(before)}")


if __name__ == "__main__":
    command_line.run(main)
