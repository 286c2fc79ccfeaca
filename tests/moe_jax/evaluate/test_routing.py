import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.evaluate.routing import describe_routing, sum_routing


def describe(probabilities, counted, experts_per_token=1):
    """Of one layer and one sequence, in two parts."""
    p, counted = jnp.asarray(probabilities), jnp.asarray(counted)
    half = len(counted) // 2
    parts = (slice(0, half), slice(half, None))
    sums = [
        sum_routing(p[None, None, part], counted[None, part], experts_per_token) for part in parts
    ]
    return describe_routing(sums)[0]


def test_a_router_that_knows_nothing_is_even_and_tells_nothing():
    found = describe(np.full((8, 4), 0.25), np.ones(8, bool), 4)
    np.testing.assert_allclose(found, [1, 1, 2, 2, 0], atol=1e-6)


def test_sure_tokens_that_differ_tell_as_much_as_there_are_experts():
    found = describe(np.eye(4)[[0, 1, 2, 3, 3, 2, 1, 0]], np.ones(8, bool))
    np.testing.assert_allclose(found, [1, 1, 2, 0, 2], atol=1e-6)


def test_sure_tokens_that_agree_tell_nothing():
    found = describe(np.eye(4)[[1] * 8], np.ones(8, bool))
    np.testing.assert_allclose(found, [0, 4, 0, 0, 0], atol=1e-6)


def test_filling_is_not_counted():
    probabilities = np.eye(4)[[0, 1, 2, 3, 0, 0, 0, 0]]
    probabilities[4:] = np.nan
    found = describe(probabilities, np.arange(8) < 4)
    np.testing.assert_allclose(found, [1, 1, 2, 0, 2], atol=1e-6)
    assert str(found) == (
        "use over fair share 1.00 to 1.00, entropy of use 2.00 bits, of a token's router 0.00 bits"
    )


def test_no_token_at_all_is_refused():
    with pytest.raises(ValueError, match="no token was counted; give a text with at least one"):
        describe(np.eye(4), np.zeros(4, bool))
