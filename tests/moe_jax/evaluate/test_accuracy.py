import math

import pytest

from moe_jax.evaluate.accuracy import Accuracy


# The intervals of Newcombe (Statistics in Medicine 17, 1998), table I, method 3, without
# continuity correction.
@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_wilsons(right, total, low, high):
    assert Accuracy(right, total).interval == pytest.approx((low, high), abs=1e-4)


def test_none_of_none_is_unknown():
    nothing = Accuracy(0, 0)
    assert math.isnan(nothing.share) and nothing.interval == (0.0, 1.0)


def test_accuracies_add_up_and_print_themselves():
    total = Accuracy(3, 4) + Accuracy(1, 4)
    assert str(total) == "50.0% (21.5% to 78.5%, 4 of 8)"
