"""The layer program as compiled for accelerators: weights in place, host work beside it."""

import functools
import re
from dataclasses import replace

import jax
import pytest
from flax import nnx

pytest.importorskip("libtpu")
pytest.importorskip("jax_plugins.xla_cuda13")

from host_offload.host_compute import compiler_options
from moe_jax.model.layer import extend_kv, run_layer
from tests.offline.compiler import compile_for, computations, fetches, host_calls, kernels
from tests.offline.layers import (
    CONFIG,
    EXPERT_BYTES,
    EXPERTS,
    WEIGHTS,
    costs_and_tally,
    dense_arguments,
    expert_arguments,
)

pytestmark = pytest.mark.offline

HALVES = replace(CONFIG, moe=CONFIG.moe.cut(2))
SHARED = replace(CONFIG, moe=replace(CONFIG.moe, shared_ffn=1536))


def compile_layer(target, tokens, slots, config, **flags):
    """One layer, `slots` of its experts resident, the others in pinned host memory."""
    graph, parameters, kv, x, step = dense_arguments(tokens, config)
    curves, tally = costs_and_tally(config)

    def layer(parameters, experts, kv, x, step, curves, tally):
        weights = nnx.merge(graph, parameters)
        return run_layer(
            weights,
            experts,
            kv,
            x,
            step,
            curves,
            tally,
            config=config,
            window=None,
            max_query_length=tokens,
        )

    experts = expert_arguments(slots, config)
    arguments = parameters, experts, kv, x, step, curves, tally
    return compile_for(target, layer, *arguments, donated=(2, 3, 6), **flags)


@functools.cache
def layer_program(target, tokens, slots, config=CONFIG):
    """The optimised program; `slots` of its experts are resident."""
    backend = {"h200": "gpu", "v5e": "tpu"}[target]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: backend)
        return compile_layer(target, tokens, slots, config, **compiler_options(backend))


H200 = [("h200", tokens, slots) for tokens in (1, 128) for slots in (0, 4)]
V5E = [("v5e", 1, 0), ("v5e", 128, 4)]
on_h200 = pytest.mark.parametrize("target, tokens, slots", H200)
on_both = pytest.mark.parametrize("target, tokens, slots", H200 + V5E)


@on_h200
def test_the_host_starts_before_the_work_of_the_device_and_ends_after_it(target, tokens, slots):
    (call,) = host_calls(layer_program(target, tokens, slots))
    opcodes = [line.opcode for line in call.beside]
    assert opcodes.count("conditional") == 1  # everything that is streamed
    assert opcodes.count("custom-call") == (2 if slots else 0)  # the products of residents


@on_both
def test_the_host_reads_weights_where_they_are(target, tokens, slots):
    (call,) = host_calls(layer_program(target, tokens, slots))
    weights = [line for line in call.operands if line.type.startswith(WEIGHTS)]
    assert len(weights) == 2 * (EXPERTS - slots)
    assert all(line.opcode == "parameter" and "S(5)" in line.type for line in weights)


@on_both
def test_every_fetch_but_the_first_runs_beside_the_expert_before(target, tokens, slots):
    """An expert is fetched at three places: as the first one, and in each of two turns."""
    every = fetches(layer_program(target, tokens, slots))
    beside = [fetch for fetch in every if fetch.beside]
    assert len(every) - len(beside) == 2 * (EXPERTS - slots)
    assert len(beside) == 2 * 2 * (EXPERTS - slots)
    for fetch in beside:
        assert all(any(kind.startswith(weight) for kind in fetch.reads) for weight in WEIGHTS)


@on_both
def test_a_fetched_expert_stays_where_it_arrives(target, tokens, slots):
    """Only the last one may be moved, by the branch that fetches nothing."""
    moving = [
        lines
        for lines in computations(layer_program(target, tokens, slots)).values()
        for line in lines
        if line.opcode == "copy" and line.type.startswith(WEIGHTS)
    ]
    assert len(moving) == 2
    assert not any(line.opcode in ("conditional", "while") for lines in moving for line in lines)


@on_h200
def test_pages_are_written_where_they_are(target, tokens, slots):
    text = layer_program(target, tokens, slots).text
    assert not re.findall(r"bf16\[(?:64,16|1024),\S* (?:copy|copy-start)\(", text)


@on_h200
def test_two_experts_are_on_their_way_at_most(target, tokens, slots):
    compiled = layer_program(target, tokens, slots)
    assert compiled.temporary_bytes < 2.1 * EXPERT_BYTES + (16 << 20) * (tokens > 1)
    assert len(kernels(compiled)) >= (3 if slots else 1)


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_halves_of_experts_are_scheduled_as_experts_are(target):
    """Three experts and a half are resident."""
    compiled, missing = layer_program(target, 1, 7, HALVES), 16 - 7
    (call,) = host_calls(compiled)
    weights = tuple(f"bf16[{rows},{columns}]" for rows, columns in HALVES.expert_shapes)
    given = [line for line in call.operands if line.type.startswith(weights)]
    assert len(given) == 2 * missing
    assert all(line.opcode == "parameter" and "S(5)" in line.type for line in given)
    assert sum(bool(fetch.beside) for fetch in fetches(compiled)) == 2 * 2 * missing


@pytest.mark.parametrize("tokens", [1, 8, 128])
def test_the_shared_expert_runs_beside_the_host(tokens):
    """Joined with the router's product it would run before, with weights copied for the purpose."""
    compiled = layer_program("h200", tokens, 4, SHARED)
    (call,) = host_calls(compiled)
    rows = 2 * SHARED.moe.shared_ffn
    beside = [line for line in call.beside if str(rows) in line.type]
    assert any(line.opcode in ("fusion", "custom-call") for line in beside)
    assert not re.findall(
        rf"bf16\[(?:{rows + 1}|{rows + EXPERTS}|{rows + EXPERTS + 1}),512\]", compiled.text
    )


@pytest.mark.parametrize("target, backend", [("h200", "gpu"), ("v5e", "tpu")])
def test_a_layer_that_only_keeps_keys_and_values_writes_them_in_place(target, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    graph, parameters, kv, x, step = dense_arguments(128, CONFIG)

    def keep(parameters, kv, x, step):
        return extend_kv(nnx.merge(graph, parameters), kv, x, step, CONFIG)

    flags = compiler_options(backend)
    compiled = compile_for(target, keep, parameters, kv, x, step, donated=(1,), **flags)
    assert not re.findall(r"bf16\[(?:64,16|1024),\S* (?:copy|copy-start)\(", compiled.text)
    product = lambda width: re.findall(rf"\[(?:128,{width}|{width},128)\]", compiled.text)
    keys_and_values = 2 * 2 * 64
    assert product(keys_and_values) and not product(8 * 64 + keys_and_values)


@pytest.mark.parametrize("tokens", [1, 128])
def test_a_resident_layer_compiles_for_a_tpu_with_both_kernels(tokens):
    assert len(kernels(layer_program("v5e", tokens, EXPERTS))) >= 3
