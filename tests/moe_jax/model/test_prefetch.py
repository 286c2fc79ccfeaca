"""Guesses of the next layer's missing experts, and when they are acted on."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.model.experts import Expert, LayerExperts
from moe_jax.model.prefetch import NOTHING, Prefetcher, guess_missing, link_has_time, pays
from moe_jax.placement.curves import CostCurves

# Token e of this router's liking chooses expert e first and expert e + 1 next.
ROUTER = jnp.asarray(2 * np.eye(4) + np.roll(np.eye(4), 1, axis=0), jnp.float32)
ADDRESS = jnp.array([3, 0, 2, 1], jnp.int32)


@pytest.mark.parametrize(
    "likes, valid, slots, expected",
    [
        ([0], [True], 2, 3),  # experts 0 and 1, at addresses 3 and 0
        ([1], [True], 1, 2),  # experts 1 and 2, at addresses 0 and 2
        ([1, 0, 0], [True, True, True], 1, 3),
        ([1, 0, 0], [True, False, False], 1, 2),
        ([0], [True], 4, NOTHING),
        ([0], [False], 0, NOTHING),
    ],
)
def test_the_missing_expert_with_most_of_the_gates_is_guessed(likes, valid, slots, expected):
    moe = MoEConfig(num_experts=4, experts_per_token=2, ffn=8)
    x = jnp.eye(4, dtype=jnp.float32)[jnp.array(likes)]
    guess = guess_missing(ROUTER, ADDRESS, jnp.int32(slots), x, jnp.array(valid), moe)
    assert int(guess) == expected


@pytest.mark.parametrize(
    "predicted, streams, stream, on_host, expected",
    [
        (1.0, 0, 0.5, 0, True),
        (1.0, 1, 0.45, 0, True),
        (1.0, 1, 0.5, 0, False),  # and the latency
        (0.4, 0, 0.5, 0, False),
        (np.inf, 0, np.inf, 0, False),
        (1.0, 1, 0.45, 8, True),
        (1.0, 1, 0.45, 9, False),  # memory is read all the time
    ],
)
def test_link_and_memory_must_have_time_for_one_more(predicted, streams, stream, on_host, expected):
    one = jnp.ones(2, jnp.float32)
    curves = CostCurves(
        tokens=jnp.array([1.0, 2.0], jnp.float32),
        host=one,
        device=one,
        stream=jnp.float32(stream),
        host_launch=jnp.float32(0),
        link_latency=jnp.float32(0.05),
        memory=jnp.float32(0.1),
    )
    expert = jnp.arange(16)
    ways = expert < streams, expert < streams + on_host
    found = link_has_time(jnp.float32(predicted), *ways, curves)
    assert bool(found) == expected


def test_prefetching_ends_where_guesses_are_wrong():
    assert pays(0, 0) and pays(63, 0) and pays(64, 16) and pays(1000, 250)
    assert not pays(64, 15) and not pays(1000, 249)


def test_what_was_fetched_for_another_layer_is_let_go():
    layer, other = (LayerExperts((), (), jnp.arange(4, dtype=jnp.int32)) for _ in range(2))
    expert = Expert(jnp.ones((4, 2)), jnp.ones((2, 2)))
    prefetcher = Prefetcher()
    prefetcher.keep(layer, 2, expert)
    assert prefetcher.take(layer) == (2, expert)
    assert prefetcher.take(layer) == (NOTHING, None)
    prefetcher.keep(layer, 2, expert)
    assert prefetcher.take(other) == (NOTHING, None)
    assert prefetcher.take(layer) == (NOTHING, None)
    assert (prefetcher.begun, prefetcher.useful) == (2, 0)
