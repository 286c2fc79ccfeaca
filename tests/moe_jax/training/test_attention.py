import jax
import jax.numpy as jnp
import pytest

from moe_jax.training.attention import causal_attention
from tests.tolerances import assert_close


def plain(query, key, value):
    """Every head with its own copy of the keys, no blocks."""
    copies = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(part, copies, axis=2) for part in (key, value))
    scores = jnp.einsum("sqhd,sphd->shqp", query, key) * query.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    probabilities = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("shqp,sphd->sqhd", probabilities, value)


def run(attention):
    """What it gives, and its gradients, in one program."""

    def values_and_gradients(*arrays, dmixed):
        mixed, gradient = jax.vjp(attention, *arrays)
        return mixed, *gradient(dmixed)

    return jax.jit(values_and_gradients)


@pytest.mark.parametrize(("positions", "heads", "kv_heads"), [(2, 2, 2), (9, 4, 1), (150, 4, 2)])
def test_values_and_gradients_are_those_of_plain_attention(positions, heads, kv_heads):
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, heads: jax.random.normal(key, (2, positions, heads, 8))
    arrays = draw(keys[0], heads), draw(keys[1], kv_heads), draw(keys[2], kv_heads)
    dmixed = draw(keys[3], heads)
    found, expected = (run(one)(*arrays, dmixed=dmixed) for one in (causal_attention, plain))
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted)
