"""What else a user could call for the same work: XLA, kernels that ship with jax, tokamax.

Knows layouts and limits of other people's functions; what they cannot do is said, not hidden.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from kernel_bench.cases import Case

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.paged_attention import paged_attention

Call = Callable[..., jax.Array]


def as_it_is(shared: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays in the layout that our kernels read."""
    return shared


class Alternative(NamedTuple):
    """Something to time.

    Attributes:
      build: returns the call, with the arrays of a case as keywords; raises where it cannot be.
      layout: turns the shared arrays into those that the call wants, outside the timing.
    """

    name: str
    build: Callable[[], Call]
    layout: Callable[[dict[str, Any]], dict[str, Any]] = as_it_is


def alternatives(case: Case, backend: str) -> Iterator[Alternative]:
    """Yields all that somebody on this backend might use instead of our kernel."""
    if case.operation == "grouped_matmul":
        yield from _products(case, backend)
    else:
        yield from _attentions(case, backend)


# Grouped matmul


def _transposed(shared: dict[str, Any]) -> dict[str, Any]:
    return {"weights": jax.jit(lambda w: jnp.swapaxes(w, 1, 2))(shared["weights"])}


def _with_epilogue(case: Case, product: Callable[[Any, Any, Any], jax.Array]) -> Call:
    """Adds what the fused kernel does besides, as XLA would."""

    def call(rows: Any, weights: Any, group_sizes: Any, row_weights: Any) -> jax.Array:
        result = product(rows, weights, group_sizes)
        if case.options["gated"]:
            gate, up = jnp.split(result.astype(jnp.float32), 2, axis=1)
            result = jax.nn.silu(gate) * up
        if row_weights is not None:
            result = result.astype(jnp.float32) * row_weights[:, None]
        return result.astype(rows.dtype)

    return call


def _products(case: Case, backend: str) -> Iterator[Alternative]:
    def ours(rows: Any, weights: Any, group_sizes: Any, row_weights: Any) -> jax.Array:
        return grouped_matmul(
            rows,
            weights,
            group_sizes,
            row_weights=row_weights,
            implementation="xla",
            **case.options,
        )

    yield Alternative("xla", lambda: ours)
    yield Alternative(
        "jax.lax.ragged_dot", lambda: _with_epilogue(case, jax.lax.ragged_dot), _transposed
    )

    def tokamax() -> Call:
        return _with_epilogue(case, importlib.import_module("tokamax").ragged_dot)

    yield Alternative("tokamax.ragged_dot", tokamax, _transposed)
    if backend == "gpu":
        for block in (64, 128):
            yield Alternative(f"jax ragged_dot_mgpu {block}", lambda b=block: _mgpu(case, b))
    if backend == "tpu":
        for tile in (512, 1024):
            yield Alternative(f"jax megablox {tile}", lambda t=tile: _megablox(case, t))


def _mgpu(case: Case, block_m: int) -> Call:
    module = importlib.import_module("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")

    def product(rows: Any, weights: Any, group_sizes: Any) -> jax.Array:
        return module.ragged_dot(
            rows,
            weights,
            group_sizes=group_sizes,
            block_m=block_m,
            block_n=128 if weights.shape[1] % 128 == 0 else 64,
            block_k=64,
            max_concurrent_steps=4,
            grid_block_n=1,
            transpose_rhs=True,
        )

    return _with_epilogue(case, product)


def _megablox(case: Case, tile: int) -> Call:
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

    def product(rows: Any, weights: Any, group_sizes: Any) -> jax.Array:
        count = rows.shape[0]
        return module.gmm(
            rows,
            weights,
            group_sizes,
            preferred_element_type=rows.dtype,
            tiling=(128 if count % 128 == 0 else count, tile, tile),
            transpose_rhs=True,
        )

    return _with_epilogue(case, product)


# Paged attention


def _attentions(case: Case, backend: str) -> Iterator[Alternative]:
    def ours(**arrays: Any) -> jax.Array:
        return paged_attention(**arrays, **case.options, implementation="xla")

    yield Alternative("xla", lambda: ours)
    if backend == "gpu":
        for splits, pages in ((4, 1), (16, 1), (16, 2)):
            yield Alternative(
                f"jax gpu.paged_attention {splits}/{pages}",
                lambda s=splits, p=pages: _jax_decode(case, s, p),
                _head_major,
            )
    if backend == "tpu":
        yield Alternative("jax ragged_paged_attention", lambda: _jax_ragged(case), _interleaved)


def _head_major(shared: dict[str, Any]) -> dict[str, Any]:
    turn = jax.jit(lambda pages: pages.transpose(2, 0, 1, 3))
    return shared | {name: turn(shared[name]) for name in ("key_pages", "value_pages")}


def _jax_decode(case: Case, splits: int, pages_per_block: int) -> Call:
    if case.regime != "decode" or case.options["sliding_window"] is not None:
        raise ValueError("knows neither several queries per sequence nor a sliding window")
    module = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")

    def call(
        query: Any,
        key_pages: Any,
        value_pages: Any,
        block_tables: Any,
        query_starts: Any,
        kv_lengths: Any,
        sinks: Any,
    ) -> jax.Array:
        if sinks is not None:
            raise ValueError("knows no sinks")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return module.paged_attention(
                query * jnp.asarray(case.options["scale"], query.dtype),
                key_pages,
                value_pages,
                block_tables,
                kv_lengths,
                k_splits=splits,
                pages_per_compute_block=pages_per_block,
            )

    return call


def _interleaved(shared: dict[str, Any]) -> dict[str, Any]:
    def join(keys: jax.Array, values: jax.Array) -> jax.Array:
        pages, size, kv_heads, head_dim = keys.shape
        return jnp.stack([keys, values], axis=3).reshape(pages, size, 2 * kv_heads, head_dim)

    joined = jax.jit(join)(shared["key_pages"], shared["value_pages"])
    return {"key_pages": joined, "value_pages": None, "sinks": shared["sinks"]}


def _jax_ragged(case: Case) -> Call:
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.ragged_paged_attention")

    def call(
        query: Any,
        key_pages: Any,
        value_pages: Any,
        block_tables: Any,
        query_starts: Any,
        kv_lengths: Any,
        sinks: Any,
    ) -> jax.Array:
        if sinks is not None:
            raise ValueError("knows no sinks")
        return module.ragged_paged_attention(
            query,
            key_pages,
            kv_lengths,
            block_tables,
            query_starts,
            jnp.full(1, kv_lengths.shape[0], jnp.int32),
            sm_scale=case.options["scale"],
            sliding_window=case.options["sliding_window"],
        )

    return call
