"""Asks a request which tokens may come next (`SamplingParams.allowed_tokens`), as a mask.

Knows no grammar: the user's function does. Runs on the host, before the step that samples.
"""

from collections.abc import Collection, Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Bool

from moe_jax.decoding.sampling_params import SamplingParams


def allowed_mask(
    params: SamplingParams,
    generated: Sequence[int],
    stop_tokens: Collection[int],
    vocab: int,
    name: str,
) -> Bool[np.ndarray, " vocab"] | None:
    """The tokens that may follow those generated so far; None: all.

    Raises ValueError, which begins with `name`, if the function fails, gives something else than
    ids or a mask of the vocabulary, or allows nothing; before min_tokens, stop tokens count as
    nothing.
    """
    if params.allowed_tokens is None:
        return None
    try:
        given = params.allowed_tokens(generated)
    except Exception as error:
        raise ValueError(
            f"{name}: allowed_tokens failed after {len(generated)} generated tokens: {error!r}"
        ) from error
    if given is None:
        return None
    mask = _mask(given, vocab, name)
    if not mask.any():
        raise ValueError(
            f"{name}: allowed_tokens allows no token after {len(generated)} generated ones; allow "
            "a token that ends the text, or return None to allow all"
        )
    if len(generated) < params.min_tokens:
        ends = [token for token in stop_tokens if token < vocab]
        others = mask.copy()
        others[ends] = False
        if not others.any():
            raise ValueError(
                f"{name}: allowed_tokens allows only tokens that end the text after "
                f"{len(generated)} generated ones, which min_tokens={params.min_tokens} forbids; "
                "allow another, or lower min_tokens"
            )
    return mask


def stack_masks(
    masks: Sequence[Bool[np.ndarray, " vocab"] | None], vocab: int
) -> Bool[np.ndarray, "seqs vocab"] | None:
    """One mask for a batch, with every token for rows of None; None if all are."""
    if all(mask is None for mask in masks):
        return None
    return np.stack([np.ones(vocab, bool) if mask is None else mask for mask in masks])


def _mask(given: object, vocab: int, name: str) -> Bool[np.ndarray, " vocab"]:
    if isinstance(given, np.ndarray | jax.Array) and given.dtype == bool:
        if given.shape != (vocab,):
            raise ValueError(
                f"{name}: allowed_tokens gave a mask of shape {list(given.shape)}, but the "
                f"vocabulary has {vocab} tokens; give [{vocab}]"
            )
        return np.asarray(given)
    if isinstance(given, np.ndarray | jax.Array) and np.issubdtype(given.dtype, np.integer):
        given = given.tolist()
    if not isinstance(given, Iterable):
        raise ValueError(_wrong(given, name))
    mask = np.zeros(vocab, bool)
    for token in given:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise ValueError(_wrong(given, name))
        if not 0 <= token < vocab:
            raise ValueError(
                f"{name}: allowed_tokens gave token {token}, but the vocabulary has {vocab} tokens "
                f"(0 to {vocab - 1})"
            )
        mask[token] = True
    return mask


def _wrong(given: object, name: str) -> str:
    return (
        f"{name}: allowed_tokens must return token ids, a bool array [vocab] or None, got {given!r}"
    )
