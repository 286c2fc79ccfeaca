"""What is drawn from, against transformers' own processors in transformers' own order."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.decoding.filters import filter_logits
from moe_jax.decoding.logit_edits import edit_logits
from moe_jax.decoding.sampling_options import stack_options
from moe_jax.decoding.sampling_params import SamplingParams
from moe_jax.decoding.text_counts import TextCounts

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
STOPS = (3, 11)
PROMPT, NEW = 12, 8

# Each row of the grid takes one of each at random.
MIN_TOKENS = (0, NEW, NEW + 1)
BIASES = ((), (3, 8), (3, 8, 15, 40))
ALLOWED_STEPS = (1, 5, 2)


def wishes(row: int, vocab: int) -> tuple[SamplingParams, list[int]]:
    """The request of this row, and the tokens that it allows."""
    least, bias, step = np.random.default_rng(row).integers(3, size=3)
    params = dataclasses.replace(
        GRID[row],
        min_tokens=MIN_TOKENS[least],
        logit_bias={token: (-1) ** token * 0.1 * token for token in BIASES[bias]},
    )
    return params, list(range(0, vocab, ALLOWED_STEPS[step]))


def process(
    logits: np.ndarray, tokens: np.ndarray, params: SamplingParams, allowed: list[int]
) -> np.ndarray:
    """What transformers draws from; the order is that of its GenerationMixin."""
    chain = transformers.LogitsProcessorList()
    if params.logit_bias:
        chain.append(
            transformers.SequenceBiasLogitsProcessor([[[t], b] for t, b in params.logit_bias])
        )
    chain.append(transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens:
        chain.append(
            transformers.MinNewTokensLengthLogitsProcessor(PROMPT, params.min_tokens, list(STOPS))
        )
    chain.append(transformers.PrefixConstrainedLogitsProcessor(lambda batch, text: allowed, 1))
    chain.append(transformers.TemperatureLogitsWarper(params.temperature))
    if params.top_k is not None:
        chain.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        chain.append(transformers.MinPLogitsWarper(params.min_p))
    scores = chain(torch.from_numpy(tokens[None]), torch.from_numpy(logits[None]))
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("vocab", [50, 997])
def test_probabilities_equal_those_of_transformers(vocab):
    generator = np.random.default_rng(vocab)
    rows = len(GRID)
    logits = (3 * generator.standard_normal((rows, vocab))).astype(np.float32)
    tokens = generator.integers(0, vocab, (rows, PROMPT + NEW))
    in_prompt, generated = np.zeros((rows, vocab), bool), np.zeros((rows, vocab), np.int32)
    np.put_along_axis(in_prompt, tokens[:, :PROMPT], True, axis=1)
    np.add.at(generated, (np.arange(rows)[:, None], tokens[:, PROMPT:]), 1)
    requests = [wishes(row, vocab) for row in range(rows)]
    allowed = np.stack([np.isin(range(vocab), ids) for _, ids in requests])

    options = stack_options([params for params, _ in requests], [STOPS] * rows, vocab)
    edited = edit_logits(
        jnp.asarray(logits),
        options,
        TextCounts(jnp.asarray(in_prompt), jnp.asarray(generated)),
        jnp.arange(rows),
        jnp.full(rows, NEW),
        jnp.asarray(allowed),
    )
    actual = np.asarray(jax.nn.softmax(filter_logits(edited, options)))
    for row, (params, ids) in enumerate(requests):
        expected = process(logits[row], tokens[row], params, ids)
        np.testing.assert_array_equal(actual[row] > 0, expected > 0, err_msg=str(params))
        np.testing.assert_allclose(actual[row], expected, atol=2e-6, err_msg=str(params))
