"""The shipped weights are those that docs/measurements/reference_model.md judges."""

import hashlib

import pytest

from moe_jax.engine.load import reference_model_folder

DIGESTS = {
    "model-00001-of-00002.safetensors": "3594c7dcd67c33b5d251c7fe82492156972d7e2d263785ef",
    "model-00002-of-00002.safetensors": "7e881b8aae4067cb2c922822c12766b60b2cf8ba9dcc8eae",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_no_bit_of_the_weights_has_changed(name):
    content = (reference_model_folder() / name).read_bytes()
    assert hashlib.blake2b(content, digest_size=24).hexdigest() == DIGESTS[name]
