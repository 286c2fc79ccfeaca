import lzma
import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.evaluate.compression import compress_with_model, compress_with_xz, target_nats
from moe_jax.evaluate.corpus import Document

DOCUMENTS = [
    Document(path=f"{size}.py", text=("abcdefghij" * size)[:size]) for size in (1, 7, 8, 9, 40)
]
END = 200


def measure(score, context=8, seqs=3):
    encode = lambda text: list(text.encode())
    return compress_with_model(
        score, DOCUMENTS, encode, end_of_text=END, context=context, seqs=seqs
    )


def test_a_model_that_knows_nothing_needs_all_bits_of_every_token():
    result = measure(lambda inputs, targets: np.full(inputs.shape, math.log(256)))
    assert result.size == sum(document.size for document in DOCUMENTS)
    assert result.tokens == result.size + len(DOCUMENTS)
    assert result.bits == pytest.approx(8 * result.tokens)
    assert result.bits_per_byte == pytest.approx(8 * result.tokens / result.size)


def test_each_token_is_scored_once_after_half_a_window_of_others():
    context, calls = 8, []

    def score(inputs, targets):
        calls.append((inputs.copy(), targets.copy()))
        # As many nats as there are tokens before the target.
        return np.broadcast_to(np.arange(context) + 1.0, inputs.shape)

    result = measure(score, context)
    assert all(inputs.shape == (3, context) for inputs, _ in calls)
    expected = 0
    for document in DOCUMENTS:
        for place in range(document.size + 1):
            expected += place + 1 if place < context else context // 2 + 1
    nats = result.bits * math.log(2)
    # Later windows end where they must, so the first of their new tokens sees half a window.
    assert nats >= expected
    for inputs, targets in calls:
        np.testing.assert_array_equal(
            inputs[:, 1:][inputs[:, 1:] != END], targets[:, :-1][inputs[:, 1:] != END]
        )


def test_nats_are_those_of_the_softmax():
    logits = jnp.log(jnp.asarray([[[1.0, 2.0, 5.0], [4.0, 2.0, 2.0]]]))
    nats = target_nats(logits, jnp.asarray([[2, 1]]))
    np.testing.assert_allclose(nats, [[-math.log(5 / 8), -math.log(1 / 4)]], rtol=1e-6)


def test_xz_is_the_strongest_preset_over_the_bytes():
    texts = [document.text.encode() for document in DOCUMENTS]
    pack = lambda data: 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    solid = compress_with_xz(DOCUMENTS, solid=True)
    assert (solid.bits, solid.size) == (pack(b"".join(texts)), 65)
    assert compress_with_xz(DOCUMENTS, solid=False).bits == sum(map(pack, texts))
