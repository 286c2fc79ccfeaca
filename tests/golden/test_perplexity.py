"""Perplexity with a stride is that of Transformers, by the recipe of its documentation."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import moe_jax
from moe_jax.engine.load import reference_model_folder
from moe_jax.evaluate.corpus import read_library, split_documents
from moe_jax.evaluate.perplexity import perplexity

pytestmark = pytest.mark.golden


def theirs(tokens, context, stride, by_the_letter=False):
    """docs/source/en/perplexity.md of Transformers: labels of old tokens are -100.

    By the letter, each window counts for a token less than its labels.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(
        reference_model_folder(), dtype=torch.float32
    )
    nats, count, previous = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        new = end - previous
        ids = torch.tensor([tokens[begin:end]])
        labels = ids.clone()
        labels[:, :-new] = -100
        with torch.no_grad():
            loss = model.eval()(ids, labels=labels).loss
        scored = int((labels[:, 1:] != -100).sum())
        if by_the_letter:
            scored = int((labels != -100).sum()) - 1
        nats, count = nats + float(loss) * scored, count + scored
        previous = end
        if end == len(tokens):
            break
    return float(np.exp(nats / count)), count


def some_tokens(engine):
    _, held_out = split_documents(read_library())
    text = next(one.text for one in held_out if one.size > 9000)
    return engine.tokenizer.encode(text)[:2000]


@pytest.mark.parametrize(("context", "stride"), [(512, 256), (300, 299), (256, 256)])
def test_the_same_text_has_the_same_perplexity(context, stride):
    engine = moe_jax.load(dtype="float32", max_tokens=1024, max_seqs=1, progress=False)
    tokens = some_tokens(engine)
    expected, count = theirs(tokens, context, stride)
    found = perplexity(engine, [tokens], context=context, stride=stride, progress=False)
    assert found.tokens == count
    assert found.value == pytest.approx(expected, rel=1e-4)


def test_the_recipe_to_the_letter_differs_by_less_than_a_thousandth():
    engine = moe_jax.load(dtype="float32", max_tokens=1024, max_seqs=1, progress=False)
    tokens = some_tokens(engine)
    expected, _ = theirs(tokens, 512, 256, by_the_letter=True)
    found = perplexity(engine, [tokens], context=512, stride=256, progress=False)
    assert found.value == pytest.approx(expected, rel=1e-3)
