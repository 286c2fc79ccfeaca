import jax
import jax.numpy as jnp
import pytest

from moe_jax.evaluate.compression import token_nats
from moe_jax.training import losses
from tests.tolerances import assert_close


def test_nats_and_gradients_are_those_of_the_whole_softmax(monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", 5)
    keys = jax.random.split(jax.random.key(0), 3)
    x, table = jax.random.normal(keys[0], (12, 8)), jax.random.normal(keys[1], (30, 8))
    targets = jax.random.randint(keys[2], (12,), 0, 30)
    plain = lambda x, table: token_nats((x @ table.T)[None], targets[None]).mean()
    actual = jax.value_and_grad(losses.mean_nats, argnums=(0, 1))(x, table, targets)
    expected = jax.value_and_grad(plain, argnums=(0, 1))(x, table)
    assert_close(actual[0], expected[0])
    for gradient, wanted in zip(actual[1], expected[1], strict=True):
        assert_close(gradient, wanted)


@pytest.mark.parametrize(("chosen", "expected"), [([[0], [1], [2], [3]], 1.0), ([[2]] * 4, 4.0)])
def test_balance_is_1_for_even_use_and_the_number_of_experts_for_one_expert(chosen, expected):
    chosen = jnp.asarray(chosen, jnp.int32)
    probabilities = jax.nn.one_hot(chosen[:, 0], 4)
    assert losses.balance_loss(probabilities, chosen) == pytest.approx(expected)
