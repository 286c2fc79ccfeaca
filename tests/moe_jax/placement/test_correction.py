import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.placement.correction import Correction


def test_an_unknown_kind_is_not_corrected_and_not_judged():
    first = Correction().after("decode", 1.0, 3.0)
    assert Correction().foresee("decode", 2.0) == 2.0
    assert first.foresee("decode", 2.0) == 6.0 and first.foresee("prefill", 2.0) == 2.0
    assert first.error is None and first.judged_steps == 0


def test_errors_are_those_of_predictions_made_before():
    correction = Correction().after("a", 1.0, 2.0).after("a", 1.0, 4.0)
    assert correction.error == pytest.approx(0.5)  # foreseen 2, measured 4
    assert correction.foresee("a", 1.0) == 3.0


def test_disturbed_steps_move_nothing_while_they_are_few():
    correction = Correction()
    for ratio in (1.0, 1000.0, 1.0, 1.0, 0.001):
        correction = correction.after("a", 1.0, ratio)
    assert correction.foresee("a", 1.0) == 1.0


def test_what_has_changed_for_good_is_learned_in_five_steps():
    correction = Correction()
    for ratio in [1.0] * 20 + [2.0] * 5:
        correction = correction.after("a", 1.0, ratio)
    assert correction.foresee("a", 1.0) == 2.0


@given(
    factor=st.floats(0.01, 100),
    predicted=st.lists(st.floats(1e-4, 10), min_size=2, max_size=30),
)
def test_a_constant_factor_is_learned_at_once(factor, predicted):
    correction = Correction()
    for seconds in predicted:
        correction = correction.after("a", seconds, factor * seconds)
    assert correction.error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("predicted", [0.0, float("inf"), float("nan")])
def test_predictions_that_say_nothing_teach_nothing(predicted):
    assert Correction().after("a", predicted, 1.0) == Correction()


@pytest.mark.parametrize("measured", [0.0, -1.0, float("nan")])
def test_a_step_takes_time(measured):
    with pytest.raises(ValueError, match=r"a step must take some time, got .* s for decode"):
        Correction().after("decode", 1.0, measured)
