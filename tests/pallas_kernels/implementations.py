"""Which implementations of an operation this machine can run, as test parameters."""

from collections.abc import Iterable

import jax
import pytest


def runnable(names: Iterable[str]) -> list:
    """All names but the kernels of other backends; compiled kernels carry `accelerator`.

    Interpreted kernels run on the CPU only: on an accelerator the compiled ones are tested.
    """
    backend = jax.default_backend()
    parameters = []
    for name in sorted(names):
        if name in ("gpu", "tpu"):
            if name == backend:
                parameters.append(pytest.param(name, marks=pytest.mark.accelerator))
        elif not name.endswith("_interpret") or backend == "cpu":
            parameters.append(name)
    return parameters
