import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax", reason="needs the train extra")

from moe_jax.training.saved_state import SavedStates
from moe_jax.training.step import TrainingConfig, initial_weights, make_step


def test_a_run_goes_on_from_what_was_saved_as_if_it_had_not_stopped(config, tmp_path):
    settings = TrainingConfig(balance=0.01, weight_decay=0.01, capacity=1.5)
    state, step, _ = make_step(config, settings, initial_weights(config, 0))
    empty = jax.tree.map(jnp.zeros_like, state)
    states = SavedStates(tmp_path / "states")
    assert states.newest(empty) is None

    def train(state, first, last):
        for number in range(first, last):
            rows = np.random.default_rng(number).integers(0, config.vocab, (2, 33))
            importance = np.ones((2, 32), np.float32)
            state, _ = step(state, rows.astype(np.int32), importance, jnp.float32(0.02))
            if number % 2:
                states.save(state)
        return state

    whole = train(state, 0, 5)
    states.close()
    again = SavedStates(tmp_path / "states").newest(empty)
    assert int(again.step) == 4
    resumed = train(again, 4, 5)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
