import jax
import numpy as np
import pytest

from moe_jax.decoding.sampling_options import stack_options, top_width
from moe_jax.decoding.sampling_params import SamplingParams

VOCAB = 500


@pytest.mark.parametrize(
    ("wishes", "biases", "stops", "draws", "filters", "counts"),
    [
        ([{}], 0, 0, False, False, False),
        ([{"top_k": 3, "top_p": 0.5, "min_p": 0.5, "logprobs": 3}], 0, 0, False, False, False),
        ([{"temperature": 1.0}, {"top_k": 3}], 0, 0, True, False, False),
        ([{}, {"temperature": 1.0, "top_k": 3}], 0, 0, True, True, False),
        ([{"temperature": 1.0, "top_p": 0.9}], 0, 0, True, True, False),
        ([{"temperature": 1.0, "min_p": 0.1}], 0, 0, True, True, False),
        ([{"temperature": 1e-40, "min_p": 0.1}], 0, 0, False, False, False),
        ([{}, {"repetition_penalty": 1.1}], 0, 0, False, False, True),
        ([{}, {"presence_penalty": 1.0}], 0, 0, False, False, True),
        ([{}, {"frequency_penalty": 1.0}], 0, 0, False, False, True),
        ([{}, {"min_tokens": 3}], 16, 4, False, False, False),
        ([{"logit_bias": {3: 1}}, {}], 16, 4, False, False, False),
        ([{"logit_bias": dict.fromkeys(range(16), 1)}], 16, 4, False, False, False),
        ([{"logit_bias": dict.fromkeys(range(17), 1)}], 300, 4, False, False, False),
        ([{"logit_bias": dict.fromkeys(range(300), 1)}], 300, 4, False, False, False),
    ],
)
def test_what_is_compiled_depends_on_what_is_used(wishes, biases, stops, draws, filters, counts):
    options = stack_options(
        [SamplingParams(**wish) for wish in wishes], [{1, 2, 3}] * len(wishes), VOCAB
    )
    assert options.bias_tokens.shape == options.bias_values.shape == (len(wishes), biases)
    assert options.stop_tokens.shape == (len(wishes), stops)
    assert (options.draws, options.filters, options.counts) == (draws, filters, counts)


@pytest.mark.parametrize(("count", "width"), [(0, 4), (4, 4), (5, 8), (8, 8), (9, 16)])
def test_stop_tokens_are_padded(count, width):
    options = stack_options([SamplingParams(min_tokens=1)], [set(range(count))], VOCAB)
    expected = [*range(count)] + [VOCAB] * (width - count)
    np.testing.assert_array_equal(options.stop_tokens, [expected])


def test_rows_do_not_matter_to_what_is_compiled():
    one = stack_options([SamplingParams(temperature=0.5, seed=1)] * 2, [{1}, {2}], VOCAB)
    other = stack_options([SamplingParams(temperature=2.0), SamplingParams()], [(), ()], VOCAB)
    assert jax.tree.structure(one) == jax.tree.structure(other)


@pytest.mark.parametrize(
    ("logprobs", "vocab", "top"), [((0, 0), 500, 0), ((0, 1), 500, 20), ((20, 3), 7, 7)]
)
def test_top_width(logprobs, vocab, top):
    assert top_width([SamplingParams(logprobs=n) for n in logprobs], vocab) == top
