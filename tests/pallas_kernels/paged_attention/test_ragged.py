"""Batches that nobody chose by hand."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pallas_kernels.paged_attention.cases import Case
from tests.pallas_kernels.paged_attention.running import check, implementations


@st.composite
def ragged_cases(draw):
    """Of few static shapes, so that few programs are compiled."""
    keys = tuple(draw(st.integers(0, 96)) for _ in range(4))
    longest = draw(st.sampled_from([1, 8, 96]))
    queries = tuple(draw(st.integers(0, min(k, longest))) for k in keys)
    return Case(
        queries=queries,
        keys=keys,
        bound=longest,
        rows=4 * longest,
        free_pages=30 - sum(-(-k // 16) for k in keys),
        free_before=draw(st.sampled_from([None, 20])),
        seed=draw(st.integers(0, 9)),
    )


@implementations
@settings(max_examples=25)
@given(case=ragged_cases())
def test_ragged_batches(implementation, case):
    check(case, "float32", implementation, case.free_before)
