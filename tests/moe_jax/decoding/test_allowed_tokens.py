import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.decoding.allowed_tokens import allowed_mask, stack_masks
from moe_jax.decoding.sampling_params import SamplingParams

VOCAB = 6
MASK = np.array([False, True, False, True, False, False])


def ask(given, generated=(), stops=(), **options):
    params = SamplingParams(allowed_tokens=lambda tokens: given, **options)
    return allowed_mask(params, generated, stops, VOCAB, "request 7")


@pytest.mark.parametrize(
    "given",
    [
        [1, 3],
        {3, 1},
        (1, 3, 1),
        range(1, 4, 2),
        iter([np.int64(3), 1]),
        np.array([3, 1], np.uint8),
        jnp.array([1, 3]),
        MASK,
        jnp.asarray(MASK),
    ],
    ids=lambda given: type(given).__name__,
)
def test_ids_and_masks(given):
    mask = ask(given)
    np.testing.assert_array_equal(mask, MASK)
    assert mask.dtype == bool


def test_none_allows_all():
    assert ask(None) is None
    assert allowed_mask(SamplingParams(), [], (), VOCAB, "request 7") is None


def test_the_function_sees_what_was_generated():
    params = SamplingParams(allowed_tokens=lambda tokens: [tokens[-1] + 1])
    mask = allowed_mask(params, [4, 2], (), VOCAB, "request 7")
    assert np.flatnonzero(mask).tolist() == [3]


def test_stop_tokens_before_min_tokens():
    stops = {3, 5, 900}
    assert ask([1, 3], [0], stops, min_tokens=2)[1]
    assert ask([3], [0, 0], stops, min_tokens=2)[3]
    with pytest.raises(
        ValueError,
        match=r"request 7: allowed_tokens allows only tokens that end the text after 1 generated "
        r"ones, which min_tokens=2 forbids; allow another, or lower min_tokens",
    ):
        ask([3, 5], [0], stops, min_tokens=2)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], r"allows no token after 2 generated ones; allow a token that ends the text"),
        (np.zeros(VOCAB, bool), r"allows no token after 2 generated ones"),
        (np.ones(5, bool), r"gave a mask of shape \[5\], but .* has 6 tokens; give \[6\]"),
        (np.ones((1, VOCAB), bool), r"gave a mask of shape \[1, 6\]"),
        ([1, 6], r"gave token 6, but the vocabulary has 6 tokens \(0 to 5\)"),
        ([-1], r"gave token -1"),
        (3, r"must return token ids, a bool array \[vocab\] or None, got 3"),
        ([True] * VOCAB, r"must return token ids"),
        ([1.0], r"must return token ids"),
        (np.ones(VOCAB), r"must return token ids"),
        (np.array([[1]]), r"must return token ids"),
        ("12", r"must return token ids, a .*got '12'"),
    ],
)
def test_what_is_neither(given, text):
    with pytest.raises(ValueError, match=f"request 7: allowed_tokens {text}"):
        ask(given, [0, 0])


def test_masks_of_a_batch():
    assert stack_masks([None, None], VOCAB) is None
    stacked = stack_masks([None, MASK], VOCAB)
    np.testing.assert_array_equal(stacked, [[True] * VOCAB, MASK])


def test_a_function_that_fails_is_named():
    def broken(generated):
        raise KeyError("no such rule")

    params = SamplingParams(allowed_tokens=broken)
    with pytest.raises(
        ValueError, match=r"request 7: allowed_tokens failed after 1 .*no such rule"
    ):
        allowed_mask(params, [0], (), VOCAB, "request 7")
