"""Where tiles come from, and which are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import gpu_memory, tuning
from pallas_kernels.grouped_matmul import gpu as grouped_gpu
from pallas_kernels.grouped_matmul import tpu as grouped_tpu
from pallas_kernels.paged_attention import gpu as paged_gpu
from pallas_kernels.paged_attention import gpu_tiles as paged_gpu_tiles
from pallas_kernels.paged_attention import tpu_tiles as paged_tpu_tiles
from pallas_kernels.paged_attention.tpu import paged_attention_tpu

WORKLOAD = paged_gpu.Workload(
    dtype="bfloat16",
    heads=32,
    kv_heads=8,
    head_dim=128,
    page_size=16,
    tokens=8,
    seqs=8,
    pages_per_seq=512,
    max_query_length=1,
)
ATTENTION = dict(
    heads=32,
    kv_heads=8,
    head_dim=128,
    page_size=16,
    pages_per_seq=512,
    max_query_length=1,
    dtype=jnp.dtype("bfloat16"),
)
# Per kernel: the operation, the implementation, a choice, other tiles than the guess.
CHOICES = {
    "grouped_matmul gpu": (
        lambda: grouped_gpu.choose_tiles(100, 8, 512, 256, jnp.bfloat16, gated=True),
        dict(rows=16, out=16, inputs=16, warps=1, stages=1),
    ),
    "grouped_matmul tpu": (
        lambda: grouped_tpu.choose_tiles(100, 8, 512, 256, "bfloat16", True),
        dict(rows=384, out=128, inputs=128),
    ),
    "paged_attention gpu": (
        lambda: paged_gpu.choose_tiles(WORKLOAD),
        dict(rows=16, block_k=128, splits=2, warps=1, stages=1),
    ),
    "paged_attention tpu": (
        lambda: paged_tpu_tiles.choose_tiles(**ATTENTION),
        dict(block_q=1, pages_per_block=3),
    ),
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty folder where the tables that ship with the package would be."""
    monkeypatch.setattr(tuning, "files", lambda name: tmp_path)
    tuning.read_table.cache_clear()
    yield tmp_path
    tuning.read_table.cache_clear()


@pytest.mark.parametrize("kernel", CHOICES)
def test_a_guess_says_that_it_is_one_and_a_measurement_is_used(kernel, package, monkeypatch):
    operation, implementation = kernel.split()
    choose, tiles = CHOICES[kernel]
    guess, measured = choose()
    assert not measured and dataclasses.asdict(guess) != tiles

    keys = []
    monkeypatch.setattr(
        {"paged_attention gpu": paged_gpu_tiles, "paged_attention tpu": paged_tpu_tiles,
         "grouped_matmul gpu": grouped_gpu, "grouped_matmul tpu": grouped_tpu}[kernel],
        "find_tiles",
        lambda *key: keys.append(key[2]) or tuning.find_tiles(*key),
    )  # fmt: skip
    choose()
    name = tuning.table_name(implementation, jax.devices()[0].device_kind)
    table = package / operation / "tiles" / name
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps({"entries": {keys[0]: {"tiles": tiles}}}))
    tuning.read_table.cache_clear()
    found, measured = choose()
    assert measured and dataclasses.asdict(found) == tiles


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_file_that_is_no_table_is_refused(text, package):
    (package / "grouped_matmul" / "tiles").mkdir(parents=True)
    (package / "grouped_matmul" / "tiles" / "gpu_some_gpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"gpu_some_gpu.json is not a table of tiles .*tune.py"):
        tuning.find_tiles("grouped_matmul", "gpu", "key", "Some GPU")


def test_tables_are_named_after_the_device():
    assert tuning.table_name("gpu", "NVIDIA H100 80GB HBM3") == "gpu_nvidia_h100_80gb_hbm3.json"
    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]


@pytest.mark.parametrize(
    "capability, expected",
    [("9.0", 227 << 10), ("8.0", 163 << 10), ("8.9", 99 << 10), (None, 99 << 10)],
)  # fmt: skip
def test_shared_memory_follows_the_compute_capability(capability, expected, monkeypatch):
    monkeypatch.setattr(gpu_memory, "compute_capability", lambda: capability)
    assert gpu_memory.shared_memory() == expected


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: grouped_gpu.Tiles(rows=8, out=16, inputs=16, warps=4, stages=3), "rows=8"),
        (lambda: grouped_gpu.Tiles(rows=16, out=48, inputs=16, warps=4, stages=3), "out=48"),
        (lambda: grouped_tpu.Tiles(rows=128, out=100, inputs=128), "multiple of 128"),
        (lambda: paged_tpu_tiles.Tiles(block_q=0, pages_per_block=1), "at least 1"),
        (
            lambda: paged_gpu_tiles.check_tiles(
                WORKLOAD, paged_gpu.Tiles(rows=16, block_k=48, splits=1, warps=4, stages=2)
            ),
            "block_k must be a power of two from 16 to 256, got 48",
        ),
    ],
)
def test_tiles_that_no_kernel_can_use_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def attention_arguments(heads, kv_heads, head_dim, dtype):
    pages = jnp.zeros((2, 16, kv_heads, head_dim), dtype)
    integers = jnp.zeros((1, 2), jnp.int32), jnp.zeros(2, jnp.int32), jnp.zeros(1, jnp.int32)
    return jnp.zeros((1, heads, head_dim), dtype), pages, pages, *integers, None


@pytest.mark.parametrize(
    "attend, shape, message",
    [
        (paged_gpu.paged_attention_gpu, (2, 1, 512, "bfloat16"), "at most 256, got 512"),
        (paged_gpu.paged_attention_gpu, (256, 1, 64, "bfloat16"), "at most 128 heads per kv head"),
        (paged_attention_tpu, (2, 1, 128, "float16"), "float32 or bfloat16, got float16"),
    ],
)  # fmt: skip
def test_attention_kernels_refuse_what_they_cannot_do(attend, shape, message):
    with pytest.raises(ValueError, match=message):
        attend(
            *attention_arguments(*shape),
            scale=1.0,
            max_query_length=1,
            sliding_window=None,
            soft_cap=None,
        )


def test_the_tpu_product_refuses_float16():
    rows, weights = jnp.zeros((4, 8), jnp.float16), jnp.zeros((2, 8, 8), jnp.float16)
    with pytest.raises(ValueError, match="float32 or bfloat16, got float16; cast"):
        grouped_tpu.grouped_matmul_tpu(rows, weights, jnp.zeros(2, jnp.int32), None, gated=False)
