import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bits import as_bits
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.shapes import HEADS
from tests.pallas_kernels.paged_attention.cases import Case
from tests.pallas_kernels.paged_attention.running import SCALE, attend, check, implementations, run
from tests.tolerances import assert_close

CASES = {
    "decode one": Case(queries=(1,), keys=(37,)),
    "decode ragged": Case(queries=(1, 1, 0, 1, 1), keys=(1, 16, 0, 17, 96)),
    "decode, one head each": Case(queries=(1, 1), keys=(40, 3), heads=2, kv_heads=2),
    "decode, one kv head": Case(queries=(1, 1), keys=(5, 40), heads=4, kv_heads=1),
    "idle sequence with keys": Case(queries=(0, 1, 0), keys=(20, 20, 90)),
    "nothing to do": Case(queries=(0, 0), keys=(0, 5)),
    "few queries": Case(queries=(3, 1, 8, 0), keys=(3, 30, 21, 9)),
    "prefill": Case(queries=(50,), keys=(50,)),
    "mixed": Case(queries=(40, 1, 0, 17), keys=(90, 33, 12, 17), page_size=16),
    "more than one query block": Case(
        queries=(140, 3, 129), keys=(150, 200, 129), heads=2, pages_per_seq=13
    ),
    "prompts beside those that decode": Case(
        queries=(1, 130, 1, 136, 0, 257, 8),
        keys=(300, 130, 40, 150, 9, 270, 8),
        heads=2,
        kv_heads=1,
        pages_per_seq=19,
    ),
    "more than one key block": Case(queries=(1, 1), keys=(1030, 700), pages_per_seq=70),
    "large pages": Case(
        queries=(20, 1), keys=(150, 129), page_size=128, pages_per_seq=2, head_dim=128
    ),
    "head_dim 80": Case(queries=(1, 9), keys=(20, 70), head_dim=80, page_size=64, pages_per_seq=2),
    "head_dim 96": Case(queries=(1, 9), keys=(20, 70), head_dim=96, page_size=32, pages_per_seq=3),
    "head_dim 192": Case(queries=(1,), keys=(35,), head_dim=192, kv_heads=4),
    "widest head": Case(queries=(9,), keys=(20,), page_size=32, head_dim=256, pages_per_seq=1),
}


ROUNDED = ("decode ragged", "mixed", "more than one key block", "head_dim 80", "widest head")


@implementations
@pytest.mark.parametrize(
    "name, dtype", [*((n, "float32") for n in CASES), *((n, "bfloat16") for n in ROUNDED)]
)
def test_values(name, dtype, implementation):
    check(CASES[name], dtype, implementation)


@implementations
@pytest.mark.parametrize("queries", [(1, 1), (9, 1)])
@pytest.mark.parametrize("name", HEADS)
def test_the_heads_of_real_models(name, queries, implementation):
    """Their numbers of heads and their options, on a short context."""
    shape = HEADS[name]
    window = None if shape.sliding_window is None else 20
    case = Case(
        queries=queries,
        keys=(45, 3),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        free_before=window,
    )
    sinks = jnp.linspace(-1, 2, shape.heads) if shape.sinks else None
    check(case, "bfloat16", implementation, window, sinks=sinks)


@pytest.mark.accelerator
@pytest.mark.parametrize("queries", [(1, 1, 1, 1), (512,), (200, 1, 0, 1)])
@pytest.mark.parametrize("name", HEADS)
def test_real_models_at_long_contexts(name, queries, accelerator):
    shape = HEADS[name]
    keys = (8192, 700, 4000, 1)[: len(queries)]
    case = Case(
        queries=queries,
        keys=keys,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        pages_per_seq=512,
        free_before=shape.sliding_window,
    )
    arrays = case.arrays("bfloat16")
    sinks = jnp.linspace(-1, 2, shape.heads) if shape.sinks else None
    options = dict(sliding_window=shape.sliding_window, soft_cap=None, sinks=sinks)
    output, log_sum_exp = run(case, arrays, accelerator, **options)
    expected, expected_log = run(case, arrays, "xla", **options)
    assert_close(output, expected)
    assert_close(log_sum_exp, expected_log, "bfloat16")


@implementations
@pytest.mark.parametrize("window", [1, 5, 1000])
@pytest.mark.parametrize("queries, keys", [((1, 1), (90, 3)), ((40, 1, 9), (95, 50, 9))])
def test_a_sliding_window_needs_no_page_before_it(queries, keys, window, implementation):
    check(Case(queries=queries, keys=keys, free_before=window), "float32", implementation, window)


@implementations
@pytest.mark.parametrize("window, keys", [(30, (1500, 20)), (600, (1030, 700))])
def test_a_window_far_behind_the_first_key_block(window, keys, implementation):
    """The second one is wide enough for a large block of keys and several small ones."""
    case = Case(queries=(1, 1), keys=keys, pages_per_seq=100, free_before=window)
    check(case, "float32", implementation, window)
    case = Case(queries=(12, 9), keys=(700, 20), pages_per_seq=100, free_before=30)
    check(case, "float32", implementation, 30)


@implementations
@pytest.mark.parametrize("queries", [(1, 1), (40, 9)])
def test_soft_cap_and_sinks(queries, implementation):
    case = Case(queries=queries, keys=(60, 10))
    sinks = jnp.array([-1.0, 0.0, 2.0, 5.0])
    check(case, "float32", implementation, soft_cap=1.5)
    check(case, "float32", implementation, sinks=sinks)
    check(case, "bfloat16", implementation, 7, 1.5, sinks.astype(jnp.bfloat16))


@implementations
@pytest.mark.parametrize("queries, dtype", [((1, 1), "bfloat16"), ((40, 9), "float32")])
def test_pages_may_be_kept_as_bits(queries, dtype, implementation):
    case = Case(queries=queries, keys=(60, 10))
    query, *pages, tables, starts, lengths = case.arrays(dtype)
    bits = [as_bits(p) for p in pages]
    assert bits[0].dtype == {"float32": jnp.uint32, "bfloat16": jnp.uint16}[dtype]
    kept = run(case, (query, *bits, tables, starts, lengths), implementation)
    expected = run(case, (query, *pages, tables, starts, lengths), implementation)
    for one, other in zip(kept, expected, strict=True):
        assert_close(one, other, dtype)


@implementations
def test_large_scores_do_not_overflow(implementation):
    case = Case(queries=(1, 12), keys=(50, 60))
    query, *rest = case.arrays("float32")
    output, log_sum_exp = run(case, (query * 1e4, *rest), implementation)
    real = sum(case.queries)
    assert np.isfinite(output).all() and np.isfinite(log_sum_exp[:real]).all()


@implementations
def test_the_log_sum_exp_merges_two_parts_of_a_context(implementation):
    """What it is for: attention over all keys is a mix of attention over disjoint parts."""
    whole = Case(queries=(1,), keys=(48,), rows=1)
    arrays = whole.arrays("float32")
    query, keys, values, tables, starts, _ = arrays
    expected, expected_log = run(whole, arrays, implementation)
    first = run(whole, (query, keys, values, tables, starts, jnp.array([32])), implementation)
    last = run(whole, (query, keys, values, tables[:, 2:], starts, jnp.array([16])), implementation)
    total = jnp.logaddexp(first[1], last[1])
    merged = sum(jnp.exp(log - total)[..., None] * part for part, log in (first, last))
    assert_close(merged, expected)
    assert_close(total, expected_log)


@pytest.mark.parametrize("max_query_length", [1, 64])
def test_lengths_and_tables_do_not_recompile(max_query_length):
    traces = []

    @jax.jit
    def attend(*arrays):
        traces.append(1)
        return paged_attention(*arrays, scale=SCALE, max_query_length=max_query_length)

    for keys in (1, 40, 90):
        case = Case(queries=(1, 1), keys=(keys, 90 - keys // 2))
        query, _, _, tables, starts, lengths = case.arrays("float32")
        pages = jnp.ones((9, 16, 2, 64))
        attend(query, pages, pages, tables, starts, lengths)
    assert len(traces) == 1


@pytest.mark.parametrize("max_query_length", [1, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint16])
def test_the_capacity_of_the_cache_costs_no_memory(dtype, max_query_length):
    def temporaries(pages, pages_per_seq):
        query = jax.ShapeDtypeStruct((64, 4, 64), {jnp.float32: dtype}.get(dtype, jnp.bfloat16))
        keys = jax.ShapeDtypeStruct((pages, 16, 2, 64), dtype)
        integers = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((2, pages_per_seq), (3,), (2,))]
        lowered = attend.lower(
            query, keys, keys, *integers, max_query_length=max_query_length, implementation="xla"
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192, 2048) <= temporaries(64, 32) + (1 << 16)


WRONG = {
    "rank": (dict(query=jnp.zeros((3, 64))), r"query must be \[tokens heads head_dim\], got shape"),
    "table rank": (dict(block_tables=jnp.zeros(2, jnp.int32)), "block_tables must be"),
    "query dtype": (dict(query=jnp.zeros((5, 4, 64), jnp.int32)), "query must be one of"),
    "pages dtype": (
        dict(value_pages=jnp.zeros((6, 16, 2, 64), jnp.bfloat16)),
        "value_pages must be float32 like query, or uint32 holding its bits; got bfloat16",
    ),
    "float lengths": (dict(kv_lengths=jnp.zeros(2)), "kv_lengths must be integers, got float32"),
    "different pages": (
        dict(value_pages=jnp.zeros((5, 16, 2, 64))),
        r"value_pages \(5, 16, 2, 64\) and key_pages .* must have one shape",
    ),
    "head_dim": (
        dict(query=jnp.zeros((5, 4, 32))),
        "head_dim of the pages is 64, of query 32",
    ),
    "heads": (
        dict(query=jnp.zeros((5, 3, 64))),
        r"heads \(3\) must be a multiple of kv_heads \(2\)",
    ),
    "empty": (dict(query=jnp.zeros((0, 4, 64))), "no axis may be empty"),
    "starts": (
        dict(query_starts=jnp.zeros(2, jnp.int32)),
        r"query_starts must have seqs \+ 1 = 3 entries, got 2",
    ),
    "lengths": (
        dict(kv_lengths=jnp.zeros(3, jnp.int32)),
        "kv_lengths must have seqs = 2 entries, got 3",
    ),
    "sinks": (dict(sinks=jnp.zeros(2)), r"sinks must be floats of shape \(4,\)"),
    "scale": (dict(scale=float("nan")), "scale must be finite, got nan"),
    "bound": (dict(max_query_length=0), "max_query_length must be at least 1, got 0"),
    "window": (dict(sliding_window=0), "sliding_window must be at least 1"),
    "cap": (dict(soft_cap=-1.0), r"soft_cap must be positive and finite, got -1\.0"),
    "implementation": (
        dict(implementation="pallas_gpu"),
        "paged_attention has no implementation 'pallas_gpu'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name):
    change, message = WRONG[name]
    arguments = dict(
        query=jnp.zeros((5, 4, 64)),
        key_pages=jnp.zeros((6, 16, 2, 64)),
        value_pages=jnp.zeros((6, 16, 2, 64)),
        block_tables=jnp.zeros((2, 3), jnp.int32),
        query_starts=jnp.zeros(3, jnp.int32),
        kv_lengths=jnp.zeros(2, jnp.int32),
        scale=SCALE,
        max_query_length=1,
    )
    with pytest.raises(ValueError, match=message):
        paged_attention(**(arguments | change))
