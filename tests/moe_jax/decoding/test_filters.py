import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.decoding.filters import filter_logits
from moe_jax.decoding.sampling_options import stack_options
from moe_jax.decoding.sampling_params import SamplingParams

VOCAB = 40


def options_of(params: SamplingParams, vocab: int = VOCAB):
    return stack_options([params], [()], vocab)


def filter_plainly(logits, params: SamplingParams) -> np.ndarray:
    """The definition, for one sequence, with a sort."""
    x = np.asarray(logits, np.float64) / (params.temperature or 1.0)
    if params.top_k is not None:
        x = np.where(x >= np.sort(x)[-min(params.top_k, x.size)], x, -np.inf)
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    x[order[before >= params.top_p]] = -np.inf
    x[p < params.min_p * p.max()] = -np.inf
    return x - x.max()


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, VOCAB + 5),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_filter_follows_the_definition(seed, **options):
    params = SamplingParams(**options)
    logits = 3 * jax.random.normal(jax.random.key(seed), (1, VOCAB))
    expected = filter_plainly(logits[0], params)
    actual = jax.jit(filter_logits)(logits, options_of(params))[0]
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(temperature=1), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(temperature=1, top_k=1), [1]),
        (SamplingParams(temperature=1, top_k=2), [1, 2, 4]),  # 2 and 4 are equally likely
        (SamplingParams(temperature=1, top_k=100), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(temperature=1, top_p=1e-30), [1]),
        (SamplingParams(temperature=1, min_p=1), [1]),
        (SamplingParams(temperature=1, min_p=np.exp(-2.01)), [1, 2, 4]),
        (SamplingParams(temperature=1e-45), [0, 1, 2, 3, 4, 5]),  # counts as greedy
    ],
)
def test_filter_keeps(params, kept):
    logits = jnp.array([[0.0, 3.0, 1.0, -0.0, 1.0, -60.0]])
    filtered = filter_logits(logits, options_of(params, 6))
    assert np.flatnonzero(np.isfinite(filtered[0])).tolist() == kept
    assert filtered.max() == 0


def test_a_row_without_filters_is_the_same_beside_one_with():
    warm = SamplingParams(temperature=1.7)
    logits = 3 * jax.random.normal(jax.random.key(1), (2, VOCAB))
    beside = stack_options([warm, SamplingParams(temperature=1.0, top_k=3)], [(), ()], VOCAB)
    alone = options_of(warm)
    assert (beside.filters, alone.filters) == (True, False)
    np.testing.assert_array_equal(
        filter_logits(logits, beside)[0], filter_logits(logits[:1], alone)[0]
    )
