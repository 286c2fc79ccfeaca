import jax
import pytest


@pytest.fixture
def accelerator() -> str:
    """The name of the compiled kernel of this machine's accelerator."""
    backend = jax.default_backend()
    if backend == "cpu":
        pytest.skip("needs a GPU or a TPU")
    return backend
