import jax
import jax.numpy as jnp
import pytest

from moe_jax.evaluate.compression import target_nats
from moe_jax.training import losses
from tests.tolerances import assert_close


@pytest.mark.parametrize("weigh", [jnp.ones_like, lambda targets: targets % 3])
def test_nats_and_gradients_are_those_of_the_whole_softmax(monkeypatch, weigh):
    monkeypatch.setattr(losses, "_CHUNK", 5)
    keys = jax.random.split(jax.random.key(0), 3)
    x, table = jax.random.normal(keys[0], (12, 8)), jax.random.normal(keys[1], (30, 8))
    targets = jax.random.randint(keys[2], (12,), 0, 30)
    importance = weigh(targets).astype(jnp.float32)

    def plain(x, table):
        nats = target_nats((x @ table.T)[None], targets[None])[0]
        return (nats * importance).sum() / importance.sum(), nats

    gradient = lambda function, *more: jax.value_and_grad(
        lambda x, table: function(x, table, *more), argnums=(0, 1), has_aux=True
    )(x, table)
    actual, expected = gradient(losses.mean_nats, targets, importance), gradient(plain)
    for one, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(one, wanted)


@pytest.mark.parametrize(("chosen", "expected"), [([[0], [1], [2], [3]], 1.0), ([[2]] * 4, 4.0)])
def test_balance_is_1_for_even_use_and_the_number_of_experts_for_one_expert(chosen, expected):
    chosen = jnp.asarray(chosen, jnp.int32)
    probabilities = jax.nn.one_hot(chosen[:, 0], 4)
    assert losses.balance_loss(probabilities, chosen) == pytest.approx(expected)
