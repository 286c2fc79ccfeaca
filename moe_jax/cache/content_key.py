"""Names of cached content: a chain of hashes over the tokens from the start of a sequence.

Knows bytes and tokens; not what is cached under a key, or where. The byte layout is fixed: keys are
the same in every process and Python version, and other caches of keys and values may rely on them.
"""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from moe_jax.cache.paged_kv import PAGE_SIZE

KEY_BYTES = 32
_DOMAIN = b"kvchunk/1\0"

Tokens = Sequence[int] | Integer[np.ndarray, " tokens"]


def root_key(identity: bytes, salt: bytes = b"") -> bytes:
    """The key that every chain of a model starts from.

    `identity` is the SHA-256 of all that decides what keys and values are for given tokens
    (weights, architecture, rope, dtype, numerics); `salt` separates users from one another.

    Raises ValueError if the identity is not a SHA-256.
    """
    _check_key("the identity", identity)
    return hashlib.sha256(_DOMAIN + b"prefix\0" + identity + _sized(salt)).digest()


def next_key(
    parent: bytes, tokens: Tokens, recipe: bytes = b"", extra: Sequence[bytes] = ()
) -> bytes:
    """The key of `tokens` after the content that `parent` names.

    `recipe` is empty for exact keys and values and otherwise says how they were approximated;
    `extra` carries (position, digest) of inputs that are not text.

    Raises ValueError if the parent is no key, or a token is no unsigned 32-bit number.
    """
    _check_key("the parent", parent)
    parts = [_sized(recipe), struct.pack("<I", len(extra)), *map(_sized, extra)]
    return _after(parent, _token_bytes(tokens), b"".join(parts))


def page_keys(root: bytes, tokens: Tokens, known: Sequence[bytes] = ()) -> list[bytes]:
    """The keys of all full pages of `tokens`, of which `known` were computed before.

    Only tokens after the known pages are read. `known` may go on beyond the tokens: they may be the
    start of those that it was computed from.

    Raises ValueError as `next_key` does.
    """
    pages = len(tokens) // PAGE_SIZE
    keys = list(known[:pages])
    parent = keys[-1] if keys else root
    _check_key("the parent", parent)
    exact = _sized(b"") + struct.pack("<I", 0)
    data = _token_bytes(tokens[len(keys) * PAGE_SIZE : pages * PAGE_SIZE])
    page_bytes = 4 * PAGE_SIZE
    for start in range(0, len(data), page_bytes):
        parent = _after(parent, data[start : start + page_bytes], exact)
        keys.append(parent)
    return keys


def _after(parent: bytes, token_bytes: bytes, rest: bytes) -> bytes:
    """Hashes parent, tokens (little-endian, 4 bytes each) and what follows them."""
    count = struct.pack("<I", len(token_bytes) // 4)
    return hashlib.sha256(_DOMAIN + b"next\0" + parent + count + token_bytes + rest).digest()


def _token_bytes(tokens: Tokens) -> bytes:
    ids = np.asarray(tokens) if len(tokens) else np.zeros(0, np.int64)
    if ids.dtype.kind not in "iu" or (ids < 0).any() or (ids > 0xFFFFFFFF).any():
        raise ValueError(
            f"token ids must be integers from 0 to {0xFFFFFFFF}, got "
            f"{ids.dtype} from {ids.min()} to {ids.max()}"
        )
    return ids.astype("<u4").tobytes()


def _sized(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def _check_key(what: str, key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise ValueError(
            f"{what} of a content key must be a SHA-256 of {KEY_BYTES} bytes, got {len(key)}; "
            "start a chain with root_key()"
        )
