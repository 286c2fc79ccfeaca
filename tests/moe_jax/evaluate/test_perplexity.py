import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.evaluate.perplexity import (
    Perplexity,
    check_texts,
    perplexity,
    summarise,
    token_nats,
    windows,
)


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_every_token_is_scored_once_with_enough_before_it(size, context, data):
    stride = data.draw(st.integers(1, context))
    text, scored = list(range(size)), []
    for tokens, new in windows(text, context, stride):
        assert len(tokens) <= context and 1 <= new <= len(tokens)
        for place in range(max(1, len(tokens) - new), len(tokens)):
            scored.append(tokens[place])
            assert place >= min(context - stride, tokens[place])
    never = range(0, size, stride) if stride == context else [0]
    assert scored == [token for token in text if token not in never]


def test_the_value_is_that_of_the_windows(engine, text):
    found = perplexity(engine, [text[:90], text[500:530]], context=40, stride=16, progress=False)
    nats = [token_nats(engine, text[0:40])]
    for start in (16, 32, 48):
        nats.append(token_nats(engine, text[start : start + 40])[-16:])
    nats.append(token_nats(engine, text[64:90])[-2:])
    nats.append(token_nats(engine, text[500:530]))
    every = np.concatenate(nats)
    assert found.tokens == every.size == 89 + 29
    assert found.nats == pytest.approx(every.mean(), rel=1e-6)
    assert found.value == pytest.approx(math.exp(every.mean()), rel=1e-6)
    assert found.units == 2
    assert perplexity(engine, [text[:90]], context=40, stride=16, progress=False).units == 5


def test_the_error_is_that_of_a_mean_over_units():
    # With units of one size a ratio estimate is the mean of the units' means.
    units = np.random.default_rng(0).normal(2, 1, (7, 40)) + np.arange(7)[:, None] / 4
    found = summarise(list(units))
    means = units.mean(axis=1)
    assert found.nats == pytest.approx(means.mean()) and found.tokens == 280 and found.units == 7
    assert found.error == pytest.approx(means.std(ddof=1) / math.sqrt(7))
    # Student's t at 97.5 % with 6 degrees of freedom: 2.447.
    assert found.interval[1] == pytest.approx(math.exp(found.nats + 2.447 * found.error), rel=1e-4)


def test_a_single_unit_has_no_interval():
    assert all(map(math.isnan, summarise([np.ones(9)]).interval))


def test_it_prints_itself():
    assert str(Perplexity(math.log(8), 0.01, 1000, 100)) == "8 (7.843 to 8.16, 1000 tokens)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 8, "stride": 9}, "context=8 tokens, stride=9 further each, leave tokens out"),
        ({"context": 1, "stride": 1}, "context at least 2"),
        ({"texts": [[5]]}, "no text has two tokens"),
        ({"texts": []}, "no text has two tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(engine, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(engine, **{"texts": [[1, 2, 3]]} | options)


@pytest.mark.parametrize("texts", ["def f():", ["def f():"], [1, 2, 3], np.arange(3), [[[1, 2]]]])
def test_what_are_no_texts_is_refused(texts):
    with pytest.raises(ValueError, match="give a list of texts, each a list of token ids"):
        check_texts(texts)
