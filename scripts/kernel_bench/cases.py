"""The products and attentions of real models as arrays on the device, with their least cost.

Knows shapes and sizes; not which kernel computes them, nor how anything is timed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul.shapes import EXPERTS, Experts
from pallas_kernels.paged_attention.shapes import HEADS, Heads

# Four times the largest second-level cache of today's GPUs: what is read again after this much
# other data comes from memory again.
COLD_BYTES = 4 * 72 * 2**20
PAGE_SIZE = 64
DTYPE = jnp.bfloat16
# Calls per dispatched program are chosen so that it keeps the device busy about this long.
_PROGRAM_SECONDS = 4e-4
_MOST_CALLS = 16
_TINY = "tiny"
_NOMINAL_BYTES_PER_SECOND, _NOMINAL_FLOPS_PER_SECOND = 3e12, 5e14
_MOST_POOL_BYTES = 2 * 2**30

MATMUL_TOKENS = {8: 0, 4096: 0, 64: 1, 512: 1, 1: 2}  # tokens -> rank of importance
DECODE_BATCHES = {(8, 8192): 0, (64, 8192): 0, (1, 8192): 1, (8, 32768): 1}
DECODE_BATCHES |= {(1, 32768): 2, (64, 32768): 3}
PREFILL = (512, 8192)  # new tokens, context with them


class Arrays(NamedTuple):
    """Arguments of several calls: what all of them share, and what each has of its own."""

    shared: dict[str, Any]
    calls: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One named piece of work.

    Attributes:
      rank: 0 for what matters most.
      bytes, flops: the least that one call must move and compute; means over the calls.
      goal: the share of the bound that the kernel should reach; None: no promise.
      memory: device bytes that the arrays need, and a second copy of what is shared: some
        alternatives want another layout.
      options: static keywords of the operation.
      make: draws the arrays.
    """

    operation: str
    name: str
    regime: str
    rank: int
    bytes: float
    flops: float
    goal: float | None
    memory: int
    options: Mapping[str, Any]
    make: Callable[[], Arrays]


def cases(operation: str, wanted: str = "", tiny: bool = False) -> list[Case]:
    """Returns the cases of an operation, most important first.

    Args:
      operation: "paged_attention" or "grouped_matmul".
      wanted: a part of the names to keep.
      tiny: small stand-ins for the real shapes, for tests.
    """
    makers = {"paged_attention": _attention_cases, "grouped_matmul": _matmul_cases}
    found = [case for case in makers[operation](tiny) if wanted in case.name]
    return sorted(found, key=lambda case: case.rank)


def memory_budget() -> int:
    """Returns the device bytes that cases may use: most of what the device says it has."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(0.85 * stats.get("bytes_limit", 2**30))


def _calls(bytes_each: float, flops_each: float, tiny: bool) -> int:
    if tiny:
        return 2
    seconds = max(bytes_each / _NOMINAL_BYTES_PER_SECOND, flops_each / _NOMINAL_FLOPS_PER_SECOND)
    return int(np.clip(np.ceil(_PROGRAM_SECONDS / seconds), 1, _MOST_CALLS))


def _normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    """Draws on the device, with the generator that is fast there."""

    @jax.jit
    def draw() -> jax.Array:
        key = jax.random.key(seed, impl="unsafe_rbg")
        return jax.random.normal(key, shape, DTYPE) * jnp.asarray(scale, DTYPE)

    return draw()


# Grouped matmul


def skewed_group_sizes(seed: int, tokens: int, experts: int, choices: int) -> np.ndarray:
    """Returns rows per expert when some experts are more popular: weights 1/sqrt(rank)."""
    random = np.random.default_rng(seed)
    popularity = random.permutation(-0.5 * np.log(np.arange(1, experts + 1)))
    scores = popularity + random.gumbel(size=(tokens, experts))
    chosen = np.argpartition(-scores, choices - 1, axis=1)[:, :choices]
    return np.bincount(chosen.ravel(), minlength=experts).astype(np.int32)


def _matmul_cases(tiny: bool) -> Iterator[Case]:
    shapes = {_TINY: Experts(experts=4, choices=2, embed=128, ffn=128)} if tiny else EXPERTS
    for tokens, rank in {4: 0, 32: 1}.items() if tiny else MATMUL_TOKENS.items():
        for name, shape in shapes.items():
            for gated in (True, False):
                yield _matmul_case(name, shape, tokens, rank, gated)


def _matmul_case(name: str, shape: Experts, tokens: int, rank: int, gated: bool) -> Case:
    width, out = (shape.embed, 2 * shape.ffn) if gated else (shape.ffn, shape.embed)
    products = out // 2 if gated else out
    rows = tokens * shape.choices
    item = jnp.dtype(DTYPE).itemsize
    matrix, bank = width * out * item, shape.experts * width * out * item
    flops = 2.0 * rows * width * out

    def sizes(seed: int) -> np.ndarray:
        return skewed_group_sizes(seed, tokens, shape.experts, shape.choices)

    def least_bytes(seed: int) -> float:
        return float((sizes(seed) > 0).sum() * matrix + rows * (width + products) * item)

    calls = _calls(least_bytes(0), flops, name == _TINY)

    def make() -> Arrays:
        each = [
            {
                "rows": _normal(seed, (rows, width)),
                "group_sizes": jnp.asarray(sizes(seed)),
                "row_weights": None if gated else _normal(seed, (rows,)).astype(jnp.float32),
            }
            for seed in range(calls)
        ]
        weights = _normal(0, (shape.experts, out, width), width**-0.5)
        return Arrays({"weights": weights}, each)

    part = "gate_up" if gated else "down"
    decode = tokens <= 64
    return Case(
        operation="grouped_matmul",
        name=f"{name} {part} {tokens} tokens",
        regime="decode" if decode else "prefill",
        rank=rank,
        bytes=float(np.mean([least_bytes(seed) for seed in range(calls)])),
        flops=flops,
        goal=0.85 if decode else 0.7 if rows >= 512 * shape.experts else None,
        # Results are counted twice: two programs may be in flight.
        memory=2 * bank + calls * rows * (width + 2 * products) * item,
        options={"gated": gated},
        make=make,
    )


# Paged attention


def _attention_cases(tiny: bool) -> Iterator[Case]:
    if tiny:
        shapes: dict[str, Heads] = {_TINY: Heads(heads=4, kv_heads=2, head_dim=64)}
        work = [(3, 1, 64, 16, 0), (1, 16, 64, 16, 1)]
    else:
        # gpt-oss alternates between layers with a window and layers without.
        full = {
            f"{name}_full": Heads(**(vars(heads) | {"sliding_window": None}))
            for name, heads in HEADS.items()
            if heads.sliding_window is not None
        }
        shapes = dict(HEADS) | full
        work = [
            (batch, 1, context, PAGE_SIZE, rank)
            for (batch, context), rank in DECODE_BATCHES.items()
        ]
        work.append((1, *PREFILL, PAGE_SIZE, 0))
    for batch, queries, context, page_size, rank in work:
        for name, heads in shapes.items():
            yield _attention_case(name, heads, batch, queries, context, page_size, rank)


def _attention_case(
    name: str, heads: Heads, batch: int, queries: int, context: int, page_size: int, rank: int
) -> Case:
    pages_per_seq = context // page_size
    item = jnp.dtype(DTYPE).itemsize
    position = 2 * heads.kv_heads * heads.head_dim * item  # a key and a value
    window = heads.sliding_window or context
    tokens = batch * queries

    def lengths(seed: int) -> np.ndarray:
        """Nearly full contexts that end anywhere in their last pages."""
        random = np.random.default_rng(seed)
        return (context - random.integers(0, context // 16, batch)).astype(np.int32)

    def least(seed: int) -> tuple[float, float]:
        keys = lengths(seed)[:, None]
        last = keys - queries + np.arange(queries)[None, :] + 1
        read = np.minimum(keys, window + queries - 1).sum()
        pairs = np.minimum(last, window).sum()
        moved = read * position + 2 * tokens * heads.heads * heads.head_dim * item
        return float(moved), 4.0 * heads.heads * heads.head_dim * float(pairs)

    calls = _calls(*least(0), name == _TINY)
    # Disjoint pages for all calls, or as many as fit: a cold cache without copies.
    needed = calls * batch * pages_per_seq
    pool = max(batch * pages_per_seq, min(needed, _MOST_POOL_BYTES // (position * page_size)))

    def make() -> Arrays:
        shape = (pool, page_size, heads.kv_heads, heads.head_dim)
        order = np.random.default_rng(0).permutation(pool).astype(np.int32)
        tables = order[np.arange(needed) % pool].reshape(calls, batch, pages_per_seq)
        starts = np.arange(batch + 1, dtype=np.int32) * queries
        shared = {"key_pages": _normal(1, shape), "value_pages": _normal(2, shape)}
        sinks = _normal(3, (heads.heads,)).astype(jnp.float32) if heads.sinks else None
        each = [
            {
                "query": _normal(4 + call, (tokens, heads.heads, heads.head_dim)),
                "block_tables": jnp.asarray(tables[call]),
                "query_starts": jnp.asarray(starts),
                "kv_lengths": jnp.asarray(lengths(call)),
            }
            for call in range(calls)
        ]
        return Arrays(shared | {"sinks": sinks}, each)

    bytes_each, flops_each = np.mean([least(seed) for seed in range(calls)], axis=0)
    regime = "decode" if queries == 1 else "prefill"
    return Case(
        operation="paged_attention",
        name=f"{name} {regime} {batch} x {queries} of {context}",
        regime=regime,
        rank=rank,
        bytes=float(bytes_each),
        flops=float(flops_each),
        goal=0.85 if queries == 1 and batch >= 8 and heads.sliding_window is None else None,
        memory=2 * pool * page_size * position + 3 * calls * tokens * heads.heads * 4 * 256,
        options={
            "scale": heads.head_dim**-0.5,
            "max_query_length": queries,
            "sliding_window": heads.sliding_window,
            "soft_cap": None,
        },
        make=make,
    )
