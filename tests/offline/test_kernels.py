"""Every kernel at the full shapes of real models, through the real compilers."""

import functools
import itertools

import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu")
pytest.importorskip("jax_plugins.xla_cuda13")

from pallas_kernels import gpu_memory
from pallas_kernels.grouped_matmul.gpu import grouped_matmul_gpu
from pallas_kernels.grouped_matmul.shapes import EXPERTS
from pallas_kernels.grouped_matmul.tpu import grouped_matmul_tpu
from pallas_kernels.paged_attention import lane_packing
from pallas_kernels.paged_attention.gpu import paged_attention_gpu
from pallas_kernels.paged_attention.shapes import HEADS
from pallas_kernels.paged_attention.tpu import paged_attention_tpu
from tests.offline.compiler import array, compile_for, kernels

pytestmark = pytest.mark.offline

TARGETS = {
    "h200": (grouped_matmul_gpu, paged_attention_gpu),
    "ada": (grouped_matmul_gpu, paged_attention_gpu),  # an H200 with an RTX 4090's shared memory
    "v5e": (grouped_matmul_tpu, paged_attention_tpu),
}
# (tokens of the step, its dtype): decode of one, of a batch, and two sizes of prefill.
STEPS = [(1, "bfloat16"), (64, "bfloat16"), (512, "bfloat16"), (4096, "bfloat16"), (64, "float32")]


@pytest.fixture(params=TARGETS)
def target(request, monkeypatch):
    """A device to compile for; the kernels' guesses believe that it is here."""
    capability = {"h200": "9.0", "ada": "8.9", "v5e": None}[request.param]
    monkeypatch.setattr(gpu_memory, "compute_capability", lambda: capability)
    return request.param


def compile_at_most(target, temporary_bytes, function, *arguments):
    """Compiles; the kernel must be in the program, and no copy of a large argument beside it.

    Both compilers refuse a kernel that needs more shared memory, or VMEM, than there is.
    """
    if target == "v5e":
        compiled = compile_for("v5e", function, *arguments)
    else:
        memory = gpu_memory.shared_memory()
        compiled = compile_for("h200", function, *arguments, shared_memory=memory)
    assert kernels(compiled)
    assert compiled.temporary_bytes <= temporary_bytes
    return compiled


def kept_pages(target, pages, page_size, kv_heads, head_dim, dtype):
    """Pages as this device keeps them."""
    packing = lane_packing(kv_heads, head_dim) if target == "v5e" else 1
    return array((pages, page_size, kv_heads // packing, packing * head_dim), dtype)


def attend(query, key_pages, value_pages, *arguments, target, **options):
    """Attends over `kept_pages`."""
    keys, values = (
        pages.reshape(*pages.shape[:2], -1, query.shape[-1]) for pages in (key_pages, value_pages)
    )
    return TARGETS[target][1](query, keys, values, *arguments, **options)


@pytest.mark.parametrize("tokens, dtype", STEPS)
@pytest.mark.parametrize("name", EXPERTS)
def test_grouped_matmul(target, name, tokens, dtype):
    shape, multiply = EXPERTS[name], TARGETS[target][0]
    rows, float32 = tokens * shape.choices, jnp.float32
    sizes, factors = array((shape.experts,), jnp.int32), array((rows,), float32)
    for outputs, inputs, gated in (
        (2 * shape.ffn, shape.embed, True),
        (shape.embed, shape.ffn, False),
    ):
        x = array((rows, inputs), dtype)
        weights = array((shape.experts, outputs, inputs), dtype)
        # Room for the rows and the products, padded and in float32, but for no expert more.
        room = 8 * rows * (inputs + outputs) + (1 << 20)
        compile_at_most(
            target,
            room,
            functools.partial(multiply, gated=gated),
            x,
            weights,
            sizes,
            None if gated else factors,
        )


@pytest.mark.parametrize(
    "seqs, queries, page_size, dtype",
    [
        (1, 1, 16, "bfloat16"),
        (8, 1, 64, "bfloat16"),
        (64, 1, 16, "bfloat16"),
        (4, 512, 16, "bfloat16"),
        (1, 512, 128, "bfloat16"),
        (8, 1, 32, "float32"),
    ],
)
@pytest.mark.parametrize("name", HEADS)
def test_paged_attention(target, name, seqs, queries, page_size, dtype):
    shape = HEADS[name]
    tokens, context = seqs * queries, 8192
    pages = kept_pages(
        target, seqs * context // page_size, page_size, shape.kv_heads, shape.head_dim, dtype
    )
    function = functools.partial(
        attend,
        target=target,
        scale=shape.head_dim**-0.5,
        max_query_length=queries,
        sliding_window=shape.sliding_window,
        soft_cap=None,
    )
    # Partial results of splits and padded heads, but no copy of the cache.
    one = tokens * shape.heads * 256 * 4
    compile_at_most(
        target,
        max(64 * one, 1 << 20) if queries == 1 else 4 * one,
        function,
        array((tokens, shape.heads, shape.head_dim), dtype),
        pages,
        pages,
        array((seqs, context // page_size), jnp.int32),
        array((seqs + 1,), jnp.int32),
        array((seqs,), jnp.int32),
        array((shape.heads,), jnp.float32) if shape.sinks else None,
    )


@pytest.mark.parametrize(
    "head_dim, page_size", list(itertools.product([64, 80, 96, 128, 256], [16, 32, 64, 128]))
)
def test_every_head_dim_and_page_size(target, head_dim, page_size):
    for heads, kv_heads, queries in ((8, 1, 1), (8, 2, 1), (8, 8, 40)):
        pages = kept_pages(target, 512, page_size, kv_heads, head_dim, jnp.bfloat16)
        function = functools.partial(
            attend,
            target=target,
            scale=0.1,
            max_query_length=queries,
            sliding_window=100,
            soft_cap=30.0,
        )
        # On a TPU, pages whose lanes no number of heads fills are copied: see paged_attention.
        copied = target == "v5e" and pages.shape[-1] % 128
        compile_at_most(
            target,
            (64 << 20) if copied else (4 << 20),
            function,
            array((4 * queries, heads, head_dim), jnp.bfloat16),
            pages,
            pages,
            array((4, 64), jnp.int32),
            array((5,), jnp.int32),
            array((4,), jnp.int32),
            array((heads,), jnp.float32),
        )
