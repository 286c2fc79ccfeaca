from dataclasses import replace

import numpy as np
import pytest

from moe_jax.placement.policies import (
    POLICIES,
    FrequencyAndRecency,
    LeastFrequentlyUsed,
    LeastStale,
    Score,
    policy_named,
)

CAUSAL = [name for name in POLICIES if name != "static"]


def history(policy, steps, experts=3):
    """The state after steps given as the experts each of them used, all with equal gates."""
    policy = policy_named(policy)
    state = policy.start(experts)
    for used in steps:
        counts = np.isin(np.arange(experts), used).astype(np.int64)
        state = policy.observe(state, counts, counts / max(1, len(used)))
    return state


def order(policy, steps, experts=3):
    """Experts from the most to the least valuable."""
    policy = policy_named(policy)
    value = policy.value(history(policy, steps, experts))
    return np.argsort(-value, kind="stable").tolist()


#: a, often but long ago; b, twice and recently; c, once in the last step.
STEPS = [[0], [0], [0], [0], [1], [1], [2]]


@pytest.mark.parametrize(
    "policy, expected",
    [
        ("static", [0, 1, 2]),
        ("lru", [2, 1, 0]),
        (LeastFrequentlyUsed(half_life=np.inf), [0, 1, 2]),
        (LeastFrequentlyUsed(half_life=0.5), [2, 1, 0]),
        ("lfru", [0, 1, 2]),  # 4 / 4, 2 / 2, 1 / 1: ties
        ("score", [2, 1, 0]),
        ("least_stale", [2, 1, 0]),
    ],
)
def test_order_worked_by_hand(policy, expected):
    assert order(policy, STEPS) == expected


def test_values_worked_by_hand():
    lfu = LeastFrequentlyUsed(half_life=1.0)
    np.testing.assert_allclose(lfu.value(history(lfu, [[0], [0, 1], []])), [0.75, 0.5, 0])
    lfru = FrequencyAndRecency()
    np.testing.assert_allclose(lfru.value(history(lfru, [[0], [0, 1], []])), [1, 0.5, 0])
    lru = policy_named("lru")
    np.testing.assert_allclose(lru.value(history(lru, [[0], [0, 1], []])), [-1, -1, -3])
    stale = policy_named("least_stale")  # b: after 5 steps, then after 1, so usually after 3
    np.testing.assert_allclose(stale.value(history(stale, STEPS)), [-3, -1 / 3, 0])
    score = Score(gate_weight=0.5)
    np.testing.assert_allclose(score.value(history(score, [[0], [0, 1]])), [0.5, 0.25, 0])


def test_score_counts_only_the_largest_shares():
    score = Score(gate_weight=1.0, gate_top=1)
    state = score.observe(score.start(3), np.array([1, 1, 0]), np.array([3.0, 1.0, 0.0]))
    np.testing.assert_allclose(score.value(state), [0.75, 0, 0])


def test_never_used_experts_are_the_stalest():
    assert order("least_stale", [[1], [], []])[0] == 1


@pytest.mark.parametrize("name", POLICIES)
def test_layers_are_independent_and_states_are_not_changed(name):
    random = np.random.default_rng(0)
    policy = POLICIES[name]
    counts = random.integers(0, 3, (9, 2, 5))
    gates = counts * random.random(counts.shape)
    both, alone = policy.start((2, 5)), [policy.start(5), policy.start(5)]
    for step in range(9):
        before = policy.value(both).copy()
        later = policy.observe(both, counts[step], gates[step])
        np.testing.assert_array_equal(policy.value(both), before)
        both = later
        rows = zip(alone, counts[step], gates[step], strict=True)
        alone = [policy.observe(s, c, g) for s, c, g in rows]
        np.testing.assert_allclose(policy.value(both), np.stack([policy.value(s) for s in alone]))


@pytest.mark.parametrize("name", CAUSAL)
def test_an_expert_used_in_every_step_beats_one_used_never(name):
    steps = [[0]] * 20
    assert order(name, steps, experts=2) == [0, 1]
    policy = POLICIES[name]
    seeded = policy.seed(policy.start(2), np.array([0.0, 0.9]), 100)
    assert policy.value(seeded)[1] > policy.value(seeded)[0]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_seed_orders_experts_by_their_rates(name):
    policy = POLICIES[name]
    value = policy.value(policy.seed(policy.start(3), np.array([0.2, 0.6, 0.4]), 50))
    assert np.argsort(-value).tolist() == [1, 2, 0]


@pytest.mark.parametrize("half_life", [4.0, np.inf])
def test_a_seed_is_what_so_many_steps_would_have_left(half_life):
    policy = LeastFrequentlyUsed(half_life=half_life)
    stepped = policy.value(history(policy, 30 * [[0]], experts=2))
    seeded = policy.value(policy.seed(policy.start(2), np.array([1.0, 0.0]), 30))
    np.testing.assert_allclose(seeded, stepped)


def test_a_seed_without_tokens_keeps_what_was_known():
    score = POLICIES["score"]
    state = history("score", [[1]])
    after = score.seed(state, np.zeros(3), 1)
    np.testing.assert_array_equal(score.value(after), score.value(state))


def test_no_tokens_change_no_use():
    state = history("lru", [[0], [], []])
    assert state.step == 3
    np.testing.assert_array_equal(state.last_use, [1, 0, 0])
    assert np.isfinite(LeastStale().value(replace(state, uses=np.ones(3)))).all()


ERRORS = {
    "half_life is 0.0; it counts steps, make it positive": dict(half_life=0.0),
    "gate_weight is 0.0; it must lie in (0, 1]": dict(gate_weight=0.0),
    "gate_weight is 1.5; it must lie in (0, 1]": dict(gate_weight=1.5),
    "gate_top is 0; at least one expert must take part": dict(gate_top=0),
}


@pytest.mark.parametrize("text", ERRORS)
def test_parameters_are_checked(text):
    with pytest.raises(ValueError) as error:
        Score(**ERRORS[text])
    assert str(error.value) == text


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError) as error:
        policy_named("fifo")
    expected = "static, lru, lfu, lfru, score, least_stale"
    assert str(error.value) == f"no policy is called 'fifo'; choose one of {expected}"


def test_shapes_are_checked():
    policy = POLICIES["lru"]
    with pytest.raises(ValueError) as error:
        policy.observe(policy.start((2, 3)), np.zeros((2, 4), int), np.zeros((2, 4)))
    assert str(error.value) == (
        "counts have shape (2, 4) and gates (2, 4), the history has (2, 3); observe the layers "
        "and experts it was started with"
    )
