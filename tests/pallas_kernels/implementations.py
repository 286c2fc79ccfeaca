"""Which implementations of an operation this machine can run, and programs that run them."""

from collections.abc import Callable, Iterable, Sequence

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


def jit_by_implementation(function: Callable, static: Sequence[str]) -> Callable:
    """Compiles a function with an argument `implementation`.

    Code that nobody runs for its speed is not optimised, which takes longer than running it.
    """
    names = ("implementation", *static)
    plain = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    quick, served = (
        jax.jit(function, static_argnames=names, compiler_options=options)
        for options in (plain, None)
    )

    def call(*arguments, implementation: str, **named):
        shown = implementation == "reference" or implementation.endswith("_interpret")
        return (quick if shown else served)(*arguments, implementation=implementation, **named)

    return call
