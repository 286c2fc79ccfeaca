"""Which implementation of an operation runs: names, defaults per backend, refusals by name.

Knows no operation: each one brings its own table of implementations.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

# One entry per backend that jax can report; a backend that is missing here is refused, not guessed.
DEFAULTS: Mapping[str, str] = {"cpu": "xla", "gpu": "gpu", "tpu": "tpu"}
# Kernels that only one backend can compile. Their interpreted forms run anywhere, slowly.
NEEDS: Mapping[str, str] = {"gpu": "gpu", "tpu": "tpu"}


def default_implementation(backend: str) -> str:
    """Returns the name that `implementation=None` stands for on this backend.

    Raises:
      ValueError: nobody decided on a default for this backend.
    """
    if backend not in DEFAULTS:
        raise ValueError(
            f"no default implementation is known for the backend {backend!r}, only for "
            f"{sorted(DEFAULTS)}; name one with implementation="
        )
    return DEFAULTS[backend]


def choose(
    operation: str, implementations: Mapping[str, Callable[..., Any]], name: str | None
) -> Callable[..., Any]:
    """Returns the implementation of this name; None means the default of the current backend.

    Args:
      operation: what the implementations compute, for messages.
      implementations: every implementation there is, by name.
      name: one of them, or None.

    Raises:
      ValueError: there is no implementation of that name, or this backend cannot run it.
    """
    backend = jax.default_backend()
    wanted = default_implementation(backend) if name is None else name
    if wanted not in implementations:
        raise ValueError(
            f"{operation} has no implementation {wanted!r} (backend: {backend}); use one of "
            f"{sorted(implementations)}, or None for this backend's default"
        )
    if NEEDS.get(wanted, backend) != backend:
        raise ValueError(
            f"{operation} cannot run its implementation {wanted!r} on the backend {backend!r}; "
            f"use {default_implementation(backend)!r}, or {wanted + '_interpret'!r} to debug it"
        )
    return implementations[wanted]
