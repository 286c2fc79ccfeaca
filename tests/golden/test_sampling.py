import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.decoding.sampling import filter_logits, stack_options
from moe_jax.decoding.sampling_params import SamplingParams

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.golden

GRID = [
    SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    for temperature, top_k, top_p, min_p, penalty in itertools.product(
        (0.3, 1.0, 1.7), (None, 1, 7, 1000), (1.0, 0.92, 0.35), (0.0, 0.03, 0.5), (1.0, 1.3, 0.8)
    )
]


def warp(logits: np.ndarray, tokens: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What transformers draws from, for one sequence of tokens so far."""
    chain = [transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    chain.append(transformers.TemperatureLogitsWarper(params.temperature))
    if params.top_k is not None:
        chain.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        chain.append(transformers.MinPLogitsWarper(params.min_p))
    scores = transformers.LogitsProcessorList(chain)(
        torch.from_numpy(tokens[None]), torch.from_numpy(logits[None])
    )
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("vocab", [50, 997])
def test_filtered_probabilities_equal_transformers(vocab):
    generator = np.random.default_rng(vocab)
    logits = (3 * generator.standard_normal((len(GRID), vocab))).astype(np.float32)
    tokens = generator.integers(0, vocab, (len(GRID), 20))
    seen = np.zeros((len(GRID), vocab), bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    filtered = filter_logits(jnp.asarray(logits), stack_options(GRID, vocab), jnp.asarray(seen))
    actual = np.asarray(jax.nn.softmax(filtered))
    for row, params in enumerate(GRID):
        expected = warp(logits[row], tokens[row], params)
        np.testing.assert_array_equal(actual[row] > 0, expected > 0, err_msg=str(params))
        np.testing.assert_allclose(actual[row], expected, atol=2e-6, err_msg=str(params))
