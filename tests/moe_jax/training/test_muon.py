import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.training.muon import muon_update, orthogonalise


@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 8, 24), (1, 24, 8)])
def test_singular_values_become_about_1_and_directions_stay(shape):
    matrices = 100 * jax.random.normal(jax.random.key(0), shape)
    made = np.asarray(orthogonalise(matrices), np.float64)
    assert made.shape == shape
    values = np.linalg.svd(made, compute_uv=False)
    assert values.min() > 0.3 and values.max() < 1.3
    left, _, right = np.linalg.svd(np.asarray(matrices, np.float64), full_matrices=False)
    nearest = left @ right
    assert (made * nearest).sum() / np.linalg.norm(made) / np.linalg.norm(nearest) > 0.97


@pytest.mark.parametrize("parts", [(8, 8), (8, 4, 4)])
def test_stacked_matrices_do_not_influence_each_other(parts):
    direction = jax.random.normal(jax.random.key(0), (3, 16, 8))
    whole = muon_update(direction, parts)
    changed = muon_update(direction.at[:, 8:].set(jnp.ones((3, 8, 8))), parts)
    assert whole.shape == direction.shape
    np.testing.assert_array_equal(whole[:, :8], changed[:, :8])


def test_tall_matrices_move_further():
    direction = jax.random.normal(jax.random.key(0), (32, 8))
    assert jnp.linalg.norm(muon_update(direction, (32,)), 2) == pytest.approx(2, rel=0.25)
