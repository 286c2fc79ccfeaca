"""The shipped weights are those that docs/measurements/reference_model.md judges."""

import hashlib

import pytest

from moe_jax.engine.load import reference_model_folder

DIGESTS = {
    "model-00001-of-00002.safetensors": "7b9eacb29db6834152df82b904f4181a57b1fe3823fff7ac",
    "model-00002-of-00002.safetensors": "85f5e3b6bffe8a3eb41b4feb6cf6578c314b5fe745d31d06",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_no_bit_of_the_weights_has_changed(name):
    content = (reference_model_folder() / name).read_bytes()
    assert hashlib.blake2b(content, digest_size=24).hexdigest() == DIGESTS[name]
