"""How many of a token's choices meet resident experts: the chance of each number.

Planning a layer is not linear in that number, so an average number would not plan an average token.
"""

import math

import numpy as np
from jaxtyping import Float


def hit_chances(
    experts: int, slots: int, chosen: int, share: float
) -> Float[np.ndarray, " chosen_and_none"]:
    """The chances that 0 to `chosen` different experts out of `experts` are in `slots` slots.

    Where all experts are chosen equally often these are hypergeometric. Otherwise residents are
    taken to be chosen as much more often than others as makes the expected number `share` times
    `chosen`: Fisher's noncentral hypergeometric distribution (Fog, 2008). A share that no such
    choice can have becomes the nearest possible number of hits.
    """
    hits = np.arange(chosen + 1)
    ways = [math.comb(slots, h) * math.comb(experts - slots, chosen - h) for h in hits.tolist()]
    log_ways = np.array([math.log(count) if count else -np.inf for count in ways])

    def chances(log_odds: float) -> Float[np.ndarray, " chosen_and_none"]:
        weights = log_ways + hits * log_odds
        weights = np.exp(weights - weights.max())
        return weights / weights.sum()

    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        if chances(middle) @ hits < share * chosen:
            low = middle
        else:
            high = middle
    return chances((low + high) / 2)
