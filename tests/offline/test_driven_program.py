"""The parts of a driven layer as compiled for accelerators: none of them touches host memory."""

import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu")
pytest.importorskip("jax_plugins.xla_cuda13")

from host_offload.host_compute import compiler_options
from moe_jax.model.driven import DrivenProgram
from moe_jax.model.prefetch import Prefetcher
from moe_jax.placement.planner import plan_layer
from tests.offline.compiler import Compiled, array, compile_for, computations, host_calls, kernels
from tests.offline.layers import (
    CONFIG,
    WEIGHTS,
    costs_and_tally,
    dense_arguments,
    expert_argument,
    expert_arguments,
)

pytestmark = pytest.mark.offline

SLOTS = 4
CASES = [(target, tokens) for target in ("h200", "v5e") for tokens in (1, 128)]
on_both = pytest.mark.parametrize("target, tokens", CASES)
PARTS = ("route", "device", "stream", "mix")


@dataclass(frozen=True)
class Part:
    """One program of a layer, its arguments, and which of them are donated."""

    function: Callable
    arguments: tuple
    donated: tuple[int, ...] = ()


def parts(tokens):
    """The parts that the device runs, each given what the ones before it return."""
    graph, parameters, kv, x, step = dense_arguments(tokens, CONFIG)
    curves, tally = costs_and_tally(CONFIG)
    experts, number = expert_arguments(SLOTS, CONFIG), array((), jnp.int32)
    program = DrivenProgram(graph, CONFIG, None, plan_layer, Counter(), Prefetcher(on=True))
    following = parameters["router"], experts.address, number
    route = Part(
        functools.partial(program._route.__wrapped__, slots=SLOTS, max_query_length=tokens),
        (parameters, experts.address, kv, x, step, curves, tally, number, following),
        (2, 3, 6),
    )
    returned = jax.eval_shape(route.function, *route.arguments)
    x, _, _, routed, rows, _ = jax.tree.map(lambda a: array(a.shape, a.dtype), returned)
    output = array(rows.shape, jnp.float32)
    one = expert_argument(CONFIG)
    return {
        "route": route,
        "device": Part(
            functools.partial(program._run_device.__wrapped__, slots=SLOTS),
            (experts.resident, rows, routed.where),
        ),
        "stream": Part(
            program._run_stream.__wrapped__,
            (one, number, rows, routed.where, output),
            (4,),
        ),
        "mix": Part(
            program._run_mix.__wrapped__,
            (parameters, x, output, output, routed),
            (1,),
        ),
    }


@functools.cache
def compiled_parts(target, tokens) -> dict[str, Compiled]:
    backend = {"h200": "gpu", "v5e": "tpu"}[target]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: backend)
        return {
            name: compile_for(
                target,
                part.function,
                *part.arguments,
                donated=part.donated,
                **compiler_options(backend),
            )
            for name, part in parts(tokens).items()
        }


@on_both
def test_no_part_reads_host_memory_or_calls_the_host(target, tokens):
    programs = compiled_parts(target, tokens)
    assert tuple(programs) == PARTS
    for program in programs.values():
        assert program.host_argument_bytes == 0 and not host_calls(program)
        assert "S(5)" not in program.text


@on_both
def test_products_of_residents_and_attention_are_kernels(target, tokens):
    programs = compiled_parts(target, tokens)
    assert len(kernels(programs["device"])) == 2
    assert len(kernels(programs["route"])) >= 1


@on_both
def test_an_expert_that_came_over_is_read_where_it_is(target, tokens):
    program = compiled_parts(target, tokens)["stream"]
    lines = [line for lines in computations(program).values() for line in lines]
    read = [line for line in lines if line.opcode == "parameter" and line.type.startswith(WEIGHTS)]
    assert read
    assert not [line for line in lines if line.opcode == "copy" and line.type.startswith(WEIGHTS)]


@on_both
def test_what_is_donated_becomes_the_result(target, tokens):
    donated = {"route": 5, "device": 0, "stream": 1, "mix": 1}  # route: x, two of kv and of tally
    for name, program in compiled_parts(target, tokens).items():
        assert (
            program.text.partition("entry_computation_layout")[0].count("-alias") == donated[name]
        )


@pytest.mark.parametrize("tokens", [1, 128])
def test_pages_are_written_where_they_are(tokens):
    text = compiled_parts("h200", tokens)["route"].text
    assert not re.findall(r"bf16\[(?:64,16|1024),\S* (?:copy|copy-start)\(", text)
