"""Keys follow a fixed byte layout, and say all that content depends on."""

import hashlib
import re
import struct

import numpy as np
import pytest

from moe_jax.cache.content_key import next_key, page_keys, root_key
from moe_jax.cache.paged_kv import PAGE_SIZE

IDENTITY = hashlib.sha256(b"a model").digest()
ROOT = root_key(IDENTITY)


def test_the_byte_layout():
    """Written out from the specification, with a recipe, extras and the largest token."""

    def sized(data):
        return struct.pack("<I", len(data)) + data

    root = hashlib.sha256(b"kvchunk/1" + b"\x00" + b"prefix" + b"\x00" + IDENTITY + sized(b"bob"))
    tokens = [0, 1, 151_643, 0xFFFFFFFF]
    following = hashlib.sha256(
        b"kvchunk/1" + b"\x00" + b"next" + b"\x00" + root.digest()
        + struct.pack("<I4I", 4, *tokens) + sized(b"quest:2048")
        + struct.pack("<I", 2) + sized(b"image") + sized(b"")
    )  # fmt: skip
    assert root_key(IDENTITY, b"bob") == root.digest()
    assert next_key(root.digest(), tokens, b"quest:2048", (b"image", b"")) == following.digest()
    assert (
        following.hexdigest() == "d74323c0b04c9d6a8588de5b4034cbd56994ebe132b4da8f47b32cac9312ab2a"
    )


def test_page_keys_are_a_chain_of_exact_keys_of_full_pages():
    tokens = list(range(3 * PAGE_SIZE - 1))
    first = next_key(ROOT, tokens[:PAGE_SIZE])
    assert page_keys(ROOT, tokens) == [first, next_key(first, tokens[PAGE_SIZE : 2 * PAGE_SIZE])]
    assert page_keys(ROOT, tokens[: PAGE_SIZE - 1]) == []
    assert page_keys(ROOT, []) == []


@pytest.mark.parametrize("known", range(4))
def test_known_keys_are_continued_from_and_their_tokens_not_read(known):
    tokens = np.arange(3 * PAGE_SIZE + 5)
    keys = page_keys(ROOT, tokens)
    tokens[: known * PAGE_SIZE] = -1
    assert page_keys(ROOT, tokens, keys[:known]) == keys
    assert page_keys(ROOT, tokens[: known * PAGE_SIZE + 3], keys) == keys[:known]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, ">i4"])
def test_arrays_and_lists_of_the_same_tokens_have_the_same_keys(dtype):
    tokens = list(range(100_000, 100_000 + PAGE_SIZE))
    array = np.asarray(tokens).astype(dtype)
    assert page_keys(ROOT, array) == page_keys(ROOT, tokens)
    assert next_key(ROOT, array) == next_key(ROOT, tokens)


def test_everything_that_content_depends_on_changes_the_key():
    keys = [
        root_key(IDENTITY),
        root_key(IDENTITY, b"a"),
        root_key(hashlib.sha256(b"another model").digest()),
        next_key(ROOT, []),
        next_key(ROOT, [1]),
        next_key(ROOT, [1, 0]),
        next_key(root_key(IDENTITY, b"a"), [1]),
        next_key(ROOT, [1], recipe=b"fp8"),
        next_key(ROOT, [1], extra=[b"fp8"]),
        next_key(ROOT, [1], extra=[b"fp", b"8"]),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: root_key(b"short"), "the identity of a content key must be a SHA-256 of 32 bytes"),
        (lambda: next_key(b"short", [1]), "the parent of a content key must be a SHA-256"),
        (lambda: page_keys(b"short", []), "got 5; start a chain with root_key()"),
        (lambda: next_key(ROOT, [3, -1]), "from 0 to 4294967295, got int64 from -1 to 3"),
        (lambda: next_key(ROOT, [2**32]), "got int64 from 4294967296 to 4294967296"),
        (lambda: next_key(ROOT, np.array([2**64 - 1], np.uint64)), "got uint64"),
    ],
)  # fmt: skip
def test_what_is_no_key_and_no_token_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
