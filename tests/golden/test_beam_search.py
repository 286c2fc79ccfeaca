"""Beam search finds what Transformers finds: the same texts, in the same order, worth the same."""

from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import moe_jax
from moe_jax.decoding.beam_search import Hypothesis
from moe_jax.engine.load import reference_model_folder
from tests.golden.beam_cases import (
    NEAR,
    Case,
    differences,
    draw_cases,
    run_engine,
    run_pieces,
    run_transformers,
)
from tests.golden.models import save_tiny, tiny_model

pytestmark = pytest.mark.golden

# name: cases, new tokens at most
MODELS = {"mixtral": (85, 24), "qwen3_moe": (85, 24), "reference": (40, 12)}


@dataclass(frozen=True)
class Compared:
    """A model, what it was asked, and what Transformers and the pieces of a beam search found.

    `gaps` has the smallest difference between neighbouring candidates of each case.
    """

    model: transformers.PreTrainedModel
    cases: list[Case]
    expected: list[list[Hypothesis]]
    found: list[list[Hypothesis]]
    gaps: list[float]


@pytest.fixture(scope="module", params=MODELS)
def compared(request):
    count, longest = MODELS[request.param]
    model = transformers_model(request.param)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # many times faster where others use the machine too

    def last_logits(texts: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(texts)).logits[:, -1].numpy()

    cases = draw_cases(model, count, seed=1, longest=longest)
    expected = [run_transformers(model, case) for case in cases]
    pairs = [run_pieces(last_logits, case, model.config.vocab_size) for case in cases]
    torch.set_num_threads(before)
    found, gaps = map(list, zip(*pairs, strict=True))
    return Compared(model, cases, expected, found, gaps)


def transformers_model(name):
    if name != "reference":
        model = tiny_model(name, vocab_size=32)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)  # surer of itself, so that texts differ in worth
        return model
    model = transformers.AutoModelForCausalLM.from_pretrained(
        reference_model_folder(), dtype=torch.float32
    )
    model.generation_config.eos_token_id = None  # the cases bring theirs
    return model.eval()


def check(actual, compared):
    """Raises AssertionError unless all are equal; near ties may differ, in one case of 50."""
    wrong, near = [], []
    for ours, theirs, case, gap in zip(
        actual, compared.expected, compared.cases, compared.gaps, strict=True
    ):
        (near if gap < NEAR else wrong).extend(differences(ours, theirs, case))
    assert not wrong
    assert len(near) <= len(compared.cases) // 50, near


def test_the_cases_end_in_both_ways(compared):
    last = [
        {text.tokens[-1] in case.eos for text in texts}
        for case, texts in zip(compared.cases, compared.expected, strict=True)
    ]
    assert sum(True in one for one in last) > len(last) / 5
    assert sum(False in one for one in last) > len(last) / 5


def test_the_search_equals_transformers(compared):
    check(compared.found, compared)


def test_the_engine_equals_transformers(compared, tmp_path):
    if compared.model.config.vocab_size == 32:
        save_tiny(compared.model, tmp_path)
        folder = tmp_path
    else:
        folder = reference_model_folder()
    engine = moe_jax.load(folder, dtype="float32", max_tokens=4096, max_seqs=64, progress=False)
    check(run_engine(engine, compared.cases), compared)
