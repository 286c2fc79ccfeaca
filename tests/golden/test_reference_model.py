"""The model that is shipped is the same model in Transformers."""

import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import moe_jax
from moe_jax.engine.load import reference_model_folder

pytestmark = pytest.mark.golden

FOLDER = reference_model_folder()
TEXTS = [
    "def main(argv=None):\n    parser = argparse.ArgumentParser(description=__doc__)\n",
    "class Tree:\n\tdef __init__(self):\r\n\t\tself.ταυ = 0x1F  # 你好 🌲\n\n\n   ",
    "<|endoftext|>import os\n\ndef ",
]


@pytest.fixture(scope="module")
def engine():
    """The engine that a call without a folder makes."""
    return moe_jax.load(dtype="float32", max_tokens=512, max_seqs=1, progress=False)


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_are_equal(engine, text):
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert engine.tokenizer.encode(text) == theirs.encode(text)
    assert theirs.decode(theirs.encode(text)) == text


def test_logits_are_equal(engine):
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    source = pathlib.Path(np.__file__).read_text(encoding="utf-8")
    tokens = np.asarray(engine.tokenizer.encode(source)[:300])
    with torch.no_grad():
        expected = model.eval()(torch.tensor(tokens[None])).logits[0].float().numpy()
    actual = engine.logits(tokens)
    assert np.abs(actual - expected).max() / np.abs(expected).max() < 1e-4


def test_the_model_is_small_and_reads_at_least_4096_tokens(engine):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 25_000_000
    assert engine.config.max_positions >= 4096
