"""The shipped weights are those that docs/measurements/reference_model.md judges."""

import hashlib

import pytest

from moe_jax.engine.load import reference_model_folder

DIGESTS = {
    "model-00001-of-00002.safetensors": "5628bde5db24715aa6f06ae910e96c3558f251838727aad2",
    "model-00002-of-00002.safetensors": "d55d6272be4031aa614b0564c98e245e76d590e565102ad8",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_no_bit_of_the_weights_has_changed(name):
    content = (reference_model_folder() / name).read_bytes()
    assert hashlib.blake2b(content, digest_size=24).hexdigest() == DIGESTS[name]
