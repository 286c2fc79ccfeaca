"""The chances of every number of hits, against counting all choices."""

import itertools
from collections import Counter

import numpy as np
import pytest

from moe_jax.placement.expected_hits import hit_chances


@pytest.mark.parametrize(
    "experts, slots, chosen", [(8, 3, 2), (8, 0, 2), (8, 8, 2), (6, 5, 4), (5, 1, 5), (64, 17, 1)]
)
def test_equal_experts_are_counted(experts, slots, chosen):
    choices = list(itertools.combinations(range(experts), chosen))
    found = Counter(sum(expert < slots for expert in choice) for choice in choices)
    expected = [found[hits] / len(choices) for hits in range(chosen + 1)]
    chances = hit_chances(experts, slots, chosen, slots / experts)
    np.testing.assert_allclose(chances, expected, atol=1e-9)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("experts, slots, chosen", [(8, 3, 2), (128, 40, 8), (1024, 300, 20)])
def test_the_expected_number_of_hits_is_the_share(experts, slots, chosen, share):
    chances = hit_chances(experts, slots, chosen, share)
    assert chances.sum() == pytest.approx(1)
    assert chances @ np.arange(chosen + 1) == pytest.approx(share * chosen)


@pytest.mark.parametrize(
    "experts, slots, chosen, share, hits",
    [(8, 1, 2, 1.0, 1), (8, 7, 2, 0.0, 1), (4, 2, 2, 0.0, 0), (4, 2, 2, 1.0, 2), (3, 0, 2, 0.5, 0)],
)
def test_a_share_that_cannot_be_is_the_nearest_number(experts, slots, chosen, share, hits):
    assert hit_chances(experts, slots, chosen, share)[hits] == pytest.approx(1, abs=1e-6)
