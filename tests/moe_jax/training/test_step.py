import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax", reason="needs the train extra")

from moe_jax.training.step import (
    TrainingConfig,
    initial_weights,
    learning_rate,
    make_step,
    stacked_rows,
)


@pytest.fixture(scope="module")
def run(config):
    """First and last state, and the metrics, of a few steps on one batch."""
    settings = TrainingConfig(balance=0.01, weight_decay=0.01, capacity=1.5)
    state, step, weights_of = make_step(config, settings, initial_weights(config, 0))
    first = jax.tree.map(jnp.copy, state)
    rows = np.random.default_rng(0).integers(0, config.vocab, (2, 33)).astype(np.int32)
    metrics = []
    for _ in range(12):
        state, measured = step(state, rows, np.ones((2, 32), np.float32), jnp.float32(0.02))
        metrics.append(measured)
    return first, state, metrics, weights_of


def test_the_loss_starts_at_chance_and_falls(run, config):
    _, _, metrics, _ = run
    assert float(metrics[0].nats.mean()) == pytest.approx(np.log(config.vocab), rel=0.15)
    assert metrics[-1].nats.mean() < metrics[0].nats.mean() - 1


def test_every_parameter_moves_and_stays_finite(run):
    first, last, _, weights_of = run
    for (path, before), after in zip(
        jax.tree.leaves_with_path(first.weights), jax.tree.leaves(last.weights), strict=True
    ):
        assert np.isfinite(after).all(), jax.tree_util.keystr(path)
        assert not np.array_equal(before, after), jax.tree_util.keystr(path)
    assert int(last.step) == 12
    assert weights_of(last).embedding.dtype == jnp.float32


def test_fused_matrices_are_taken_apart_for_muon(config):
    assert stacked_rows(config, "['layers'][0]['attention']['qkv'].value") == (32, 16, 16)
    assert stacked_rows(config, "['layers'][0]['experts']['gate_up'].value") == (12, 12)
    assert stacked_rows(config, "['layers'][0]['experts']['down'].value") == (16,)
    assert stacked_rows(config, "['layers'][0]['router'].value") is None
    assert stacked_rows(config, "['embedding'].value") is None


def test_the_rate_rises_stays_and_falls_to_0():
    rates = [learning_rate(progress, 2.0) for progress in (0.01, 0.02, 0.3, 0.5, 0.775, 1.0, 1.1)]
    np.testing.assert_allclose(rates, [1, 2, 2, 2, 1, 0, 0])
