"""Shows what device, link and host do during a step, as text and as a picture.

Generates a few tokens and plays the last step as it was planned. With --machine, the same routing
is planned for another machine and another size of expert.
"""

import argparse
from pathlib import Path

import command_line
import numpy as np

import moe_jax
from moe_jax.engine.load import reference_model_folder
from moe_jax.engine.sizing import device_memory_for
from moe_jax.placement.machines import MACHINES, curves_for, machine_named
from moe_jax.placement.planner import plan_layer, plan_layers
from moe_jax.placement.timeline import Timeline, make_timeline
from moe_jax.placement.timeline_picture import draw_timeline


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", nargs="?", help="a Hugging Face folder (default: the embedded model)")
    add("--resident", type=float, default=0.5, help="share of the experts on the device (0.5)")
    add("--prompt", default="def fibonacci(n):\n", help="text to continue")
    add("--tokens", type=int, default=8, help="tokens to generate; 1: shows the prefill (8)")
    add("--layers", type=int, default=8, help="layers in the picture, the first ones (8)")
    add("--machine", choices=MACHINES, help="plan for this machine instead")
    add("--embed", type=int, default=4096, help="with --machine: width of the model (4096)")
    add("--ffn", type=int, default=14336, help="with --machine: width of an expert (14336)")
    add("--out", help="file for the picture, for example timeline.png")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Refuses before any work what would fail after it, or draw nothing; makes --out's folder.

    Raises ValueError for a count below 1, without matplotlib and for an unknown kind of picture,
    and OSError if there can be no such folder.
    """
    command_line.check_least(arguments, tokens=1, layers=1, embed=1, ffn=1)
    if not arguments.out:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase  # noqa: PLC0415 - the train extra
    except ImportError as error:
        raise ValueError(
            "drawing needs matplotlib, which is not installed: pip install 'moe-jax[train]'"
        ) from error
    out, kinds = Path(arguments.out), FigureCanvasBase.get_supported_filetypes()
    if out.suffix[1:].lower() not in kinds:
        raise ValueError(f"--out is {out}; choose a name that ends in one of {', '.join(kinds)}")
    out.parent.mkdir(parents=True, exist_ok=True)


def plan_elsewhere(engine: moe_jax.Engine, arguments: argparse.Namespace) -> Timeline:
    """The last step's routing, planned for another machine and expert."""
    counts, resident = engine.last_routing()
    curves = curves_for(machine_named(arguments.machine), arguments.embed, arguments.ffn)
    modes = np.asarray(plan_layers(plan_layer, counts, resident, curves).mode)
    return make_timeline(counts, modes, curves)


def main() -> None:
    arguments = parse()
    check(arguments)
    folder = arguments.checkpoint or reference_model_folder()
    budget = device_memory_for(folder, experts=arguments.resident)
    engine = moe_jax.load(arguments.checkpoint, device_memory=budget)
    engine.generate(arguments.prompt, max_tokens=arguments.tokens, ignore_eos=True)
    timeline = plan_elsewhere(engine, arguments) if arguments.machine else engine.timeline()
    print(timeline)
    if arguments.out:
        what = "prefill" if arguments.tokens == 1 else "decode step"
        where = arguments.machine or "this machine"
        title = f"A {what} as planned for {where}, {arguments.resident:.0%} of the experts resident"
        figure = draw_timeline(timeline, layers=arguments.layers, title=title)
        figure.savefig(arguments.out, dpi=150)
        print(f"written to {arguments.out}")


if __name__ == "__main__":
    command_line.run(main)
