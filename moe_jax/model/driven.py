"""The executor that drives a layer from Python, host experts being a program of the CPU client.

Knows one layer's arrays; not how many layers there are.

A layer whose experts are not all resident runs in parts:

    route    device  attention, router, dispatch, plan; Python reads the plan's modes
             link    transfers of the streamed experts start, two at a time
    host     host    the experts in mode HOST, on the processor's own client
    device   device  the resident experts, beside link and host
    stream   device  one streamed expert, once it has arrived; called for each of them
    mix      device  the sum of all that, weighted by the gates, and the shared expert

They are made of the functions that the compiled executor is made of, and sum in the same order.
Other layers run as one program, as there. While the link has nothing else to do, an expert may come
over that the next layer will probably want (`moe_jax.model.prefetch`).

On a GPU this has not run; its parts compile for a GPU and a TPU (`tests/offline`). What is known: a
`switch` on a traced index blocks the launching thread until the device has drained, and here there
is none; a transfer that Python starts is a DMA copy; the CPU client works asynchronously and has no
limit on pinned memory. What is to be measured: how long the modes take to arrive, which is one
round trip per layer; whether moving rows to the CPU client and its output back blocks Python (the
output is waited for last); and how fast a transfer from the CPU client's memory is, which the
driver has not pinned and may have to stage.
"""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from host_offload.host_compute import compiler_options
from host_offload.memory import host_device, sharding, to_device
from moe_jax.cache.paged_kv import LayerKv
from moe_jax.config import ModelConfig
from moe_jax.model.compiled import LayerProgram, ServedLayer
from moe_jax.model.dispatch import gather_rows
from moe_jax.model.experts import Expert, run_arrived, run_on_host, run_resident
from moe_jax.model.int8 import Int8Expert
from moe_jax.model.layer import attend_and_route, mix
from moe_jax.model.prefetch import NOTHING, Prefetcher, guess_missing, pays
from moe_jax.model.step import StepState
from moe_jax.model.tally import Tally
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Mode, Planner

# As many experts as the memory plan has room for besides the resident ones.
_IN_TRANSIT = 2


class DrivenProgram:
    """Runs the layers of one kind. Donates the KV pages, the activations and the tally."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        config: ModelConfig,
        window: int | None,
        planner: Planner,
        traces: Counter,
        prefetcher: Prefetcher,
    ):
        self._prefetcher = prefetcher
        # Layers with experts on the host do not round, and where experts are must not matter.
        self._whole = LayerProgram(graph, config, window, planner, traces, rounds=False)
        self._host_device = host_device()

        def route(
            parameters,
            address,
            kv,
            x,
            step,
            curves,
            tally,
            fetched,
            following,
            slots,
            max_query_length,
        ):
            kind = x.shape[0], max_query_length, slots, window, following is not None
            traces["route", *kind] += 1
            x, kv, routed, tally = attend_and_route(
                nnx.merge(graph, parameters),
                address,
                slots,
                kv,
                x,
                step,
                curves,
                tally,
                planner,
                config=config,
                window=window,
                max_query_length=max_query_length,
                fetched=fetched,
            )
            normed = routed.normed
            wanted = jnp.int32(NOTHING)
            if following is not None:
                router, next_address, next_slots = following
                guess = guess_missing(
                    router, next_address, next_slots, normed, step.valid, config.moe
                )
                wanted = jnp.where(routed.link_has_time, guess, wanted)
            rows = gather_rows(normed, routed.where)
            return x, kv, tally, routed, rows, jnp.append(routed.mode, wanted)

        def run_host(host, rows, where, mode, slots):
            traces["host", where.position.shape[0], slots, window] += 1
            return run_on_host(host, rows, where, mode, slots, config.activation)

        def run_device(resident, rows, where, slots):
            traces["device", where.position.shape[0], slots, window] += 1
            return run_resident(resident, rows, where, config.activation)

        def run_stream(expert, address, rows, where, output):
            traces["stream", where.position.shape[0], window] += 1
            return run_arrived(expert, address, rows, where, output, config.activation)

        def run_mix(parameters, x, output, hosted, routed):
            traces["mix", x.shape[0], hosted is not None, window] += 1
            if hosted is not None:
                output = output + hosted
            return mix(nnx.merge(graph, parameters), x, output, routed, config)

        options = compiler_options()
        self._route = jax.jit(
            route,
            static_argnames=("slots", "max_query_length"),
            donate_argnames=("kv", "x", "tally"),
            compiler_options=options,
        )
        self._run_host = jax.jit(
            run_host, static_argnames="slots", compiler_options=compiler_options("cpu")
        )
        self._run_device = jax.jit(run_device, static_argnames="slots", compiler_options=options)
        self._run_stream = jax.jit(run_stream, donate_argnames="output", compiler_options=options)
        self._run_mix = jax.jit(run_mix, donate_argnames="x", compiler_options=options)

    def __call__(
        self,
        layer: ServedLayer,
        kv: LayerKv,
        x: Float[Array, "tokens embed"],
        step: StepState,
        curves: CostCurves,
        tally: Tally,
        max_query_length: int,
        following: ServedLayer | None = None,
    ) -> tuple[Float[Array, "tokens embed"], LayerKv, Tally]:
        """DONATES kv, x and tally. Runs one layer on one step's tokens."""
        experts = layer.experts
        if experts is None or not experts.host:
            return self._whole(layer, kv, x, step, curves, tally, max_query_length)
        slots, prefetcher = experts.slots, self._prefetcher
        fetched, held = prefetcher.take(experts)
        x, kv, tally, routed, in_order, decision = self._route(
            layer.parameters,
            experts.address,
            kv,
            x,
            step,
            curves,
            tally,
            np.int32(fetched),
            _router_of(following) if prefetcher.on else None,
            slots=slots,
            max_query_length=max_query_length,
        )
        mode, wanted = np.asarray(decision)[:-1], int(decision[-1])
        to_run = np.flatnonzero(mode == Mode.STREAM).tolist()
        to_bring = [experts.host[address - slots] for address in to_run]
        brought: list[Expert | Int8Expert] = []
        if held is not None and mode[fetched] != Mode.IDLE:
            prefetcher.useful += 1
            to_run, brought = [fetched, *to_run], [held]
        del held
        ahead = None if following is None else following.experts
        if wanted != NOTHING and ahead is not None and pays(prefetcher.begun, prefetcher.useful):
            to_bring.append(ahead.host[wanted - ahead.slots])
        while to_bring and len(brought) < _IN_TRANSIT:
            brought.append(to_device(to_bring.pop(0)))
        hosted = None
        if (mode == Mode.HOST).any():
            given = in_order, routed.where
            rows, where = jax.device_put(given, sharding("device", self._host_device))
            hosted = self._run_host(experts.host, rows, where, mode[slots:], slots=slots)
        output = self._run_device(experts.resident, in_order, routed.where, slots=slots)
        for address in to_run:
            output = self._run_stream(
                brought.pop(0), np.int32(address), in_order, routed.where, output
            )
            if to_bring:
                output.block_until_ready()  # the memory of what ran is free now
                brought.append(to_device(to_bring.pop(0)))
        if ahead is not None and brought:
            prefetcher.keep(ahead, wanted, brought.pop())
        if hosted is not None:
            hosted = jax.device_put(hosted, sharding("device"))
        return self._run_mix(layer.parameters, x, output, hosted, routed), kv, tally

    def extend_kv(
        self,
        layer: ServedLayer,
        kv: LayerKv,
        x: Float[Array, "tokens embed"],
        step: StepState,
    ) -> LayerKv:
        """DONATES kv. Adds the keys and values of one step's tokens, and runs nothing else."""
        return self._whole.extend_kv(layer, kv, x, step)


def _router_of(layer: ServedLayer | None) -> tuple[Array, Array, np.int32] | None:
    """Router, addresses and slots of a layer that misses experts."""
    if layer is None or layer.experts is None or not layer.experts.host:
        return None
    return layer.parameters["router"], layer.experts.address, np.int32(layer.experts.slots)
