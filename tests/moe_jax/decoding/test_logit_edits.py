import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.decoding.logit_edits import edit_logits
from moe_jax.decoding.sampling_options import stack_options
from moe_jax.decoding.sampling_params import SamplingParams
from moe_jax.decoding.text_counts import TextCounts

VOCAB = 24
ROWS = 4  # of the counts
TOKEN = st.integers(0, VOCAB - 1)
EDIT = jax.jit(edit_logits)


@st.composite
def requests(draw):
    """Options, stop tokens, prompt, generated tokens, and a mask or None."""
    options = {
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3, 0.7])),
        "presence_penalty": draw(st.sampled_from([0.0, 2.0, -0.5])),
        "frequency_penalty": draw(st.sampled_from([0.0, 0.25, -2.0])),
        "logit_bias": draw(st.dictionaries(TOKEN, st.floats(-100, 100, width=32), max_size=20)),
        "min_tokens": draw(st.integers(0, 6)),
    }
    stops = draw(st.sets(st.integers(0, VOCAB + 3), max_size=6))
    texts = draw(st.tuples(st.lists(TOKEN, max_size=8), st.lists(TOKEN, max_size=8)))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=VOCAB, max_size=VOCAB))
    return options, stops, *texts, mask


def edit_plainly(logits, params, stops, prompt, generated, mask):
    """The formulas, for one sequence, token by token."""
    edited = np.array(logits, np.float64)
    for token, value in params.logit_bias:
        edited[token] += value
    for token in range(VOCAB):
        if token in prompt or token in generated:
            harder = edited[token] < 0
            edited[token] *= params.repetition_penalty if harder else 1 / params.repetition_penalty
        # https://platform.openai.com/docs: mu - c * frequency - float(c > 0) * presence
        count = generated.count(token)
        edited[token] -= count * params.frequency_penalty
        edited[token] -= float(count > 0) * params.presence_penalty
        if token in stops and len(generated) < params.min_tokens:
            edited[token] = -np.inf
        if mask is not None and not mask[token]:
            edited[token] = -np.inf
    return edited


def counts_of(texts) -> TextCounts:
    """The texts in the last rows of the counts; what other rows hold must not matter."""
    in_prompt = np.ones((ROWS, VOCAB), bool)
    generated = np.full((ROWS, VOCAB), 7, np.int32)
    for row, (prompt, tokens) in enumerate(texts, ROWS - len(texts)):
        in_prompt[row] = np.isin(range(VOCAB), prompt)
        generated[row] = np.bincount(np.array(tokens, int), minlength=VOCAB)
    return TextCounts(jnp.asarray(in_prompt), jnp.asarray(generated))


@hypothesis.given(batch=st.lists(requests(), min_size=3, max_size=3), seed=st.integers(0, 999))
def test_edits_follow_the_formulas(batch, seed):
    logits = 3 * jax.random.normal(jax.random.key(seed), (len(batch), VOCAB))
    wishes, stops, prompts, generated, masks = zip(*batch, strict=True)
    params = [SamplingParams(**options) for options in wishes]
    allowed = None
    if any(mask is not None for mask in masks):
        allowed = jnp.array([[True] * VOCAB if mask is None else mask for mask in masks])
    actual = EDIT(
        logits,
        stack_options(params, stops, VOCAB),
        counts_of(list(zip(prompts, generated, strict=True))),
        jnp.arange(ROWS - len(batch), ROWS),
        jnp.array([len(tokens) for tokens in generated]),
        allowed,
    )
    for row, request in enumerate(batch):
        expected = edit_plainly(logits[row], params[row], *request[1:])
        np.testing.assert_allclose(actual[row], expected, rtol=1e-5, atol=1e-4)


def test_a_row_past_the_counts_is_a_text_without_tokens():
    options = stack_options([SamplingParams(repetition_penalty=2.0)], [()], VOCAB)
    logits = jnp.ones((1, VOCAB))
    new = jnp.array([0])
    counts = counts_of([])
    penalised = edit_logits(logits, options, counts, jnp.array([ROWS - 1]), new, None)
    assert (penalised == 0.5).all()
    untouched = edit_logits(logits, options, counts, jnp.array([ROWS]), new, None)
    np.testing.assert_array_equal(untouched, logits)


def test_a_row_without_wishes_is_untouched_beside_one_with_all():
    wishes = SamplingParams(
        repetition_penalty=1.3,
        presence_penalty=1.0,
        frequency_penalty=1.0,
        logit_bias=dict.fromkeys(range(VOCAB), 3.3),
        min_tokens=5,
    )
    options = stack_options([SamplingParams(), wishes], [{1}, {2}], VOCAB)
    logits = jax.random.normal(jax.random.key(0), (2, VOCAB))
    allowed = jnp.array([[True] * VOCAB, [False] * VOCAB])
    rows = jnp.array([0, 1])
    edited = EDIT(logits, options, counts_of([]), rows, jnp.array([0, 0]), allowed)
    np.testing.assert_array_equal(edited[0], logits[0])
    assert (edited[1] == -jnp.inf).all()
