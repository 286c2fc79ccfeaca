import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.training.mixture import mixture
from tests.tolerances import assert_close

TOKENS = 64


def output_and_gradient(layer, config, capacity):
    x = jax.random.normal(jax.random.key(1), (TOKENS, config.embed))
    graph, state = nnx.split(layer)

    def run(state, x):
        mixed = mixture(nnx.merge(graph, state), config, x, capacity)
        return (mixed.output * mixed.output).sum() + mixed.balance, mixed.output

    gradient, y = jax.grad(run, argnums=(0, 1), has_aux=True)(state, x)
    return y, jax.tree.leaves(gradient)


def test_with_room_for_all_sending_tokens_to_experts_is_exact(weights, config):
    exact = output_and_gradient(weights.layers[0], config, None)
    sent = output_and_gradient(weights.layers[0], config, float(config.moe.num_experts))
    assert_close(sent[0], exact[0])
    for actual, expected in zip(sent[1], exact[1], strict=True):
        assert_close(actual, expected)


def test_without_room_the_last_tokens_lose_their_expert(weights, config):
    layer = weights.layers[0]
    # All tokens choose experts 0 and 1; there is room for half of them.
    layer.router[...] = jnp.zeros_like(layer.router[...]).at[:2].set(1.0)
    x = jnp.abs(jax.random.normal(jax.random.key(1), (TOKENS, config.embed)))
    mixed = mixture(layer, config, x, None)
    exact, short = mixed.output, mixture(layer, config, x, 1.0).output
    np.testing.assert_allclose(mixed.shares, [0.5, 0.5, 0, 0])
    assert_close(short[: TOKENS // 2], exact[: TOKENS // 2])
    np.testing.assert_array_equal(short[TOKENS // 2 :], 0)
