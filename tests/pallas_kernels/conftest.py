from importlib.util import find_spec

import jax
import pytest

# scripts/gpu_check.py runs the other tests where hypothesis is not installed.
collect_ignore_glob = [] if find_spec("hypothesis") else ["*/test_ragged.py", "*/test_row_tiles.py"]


@pytest.fixture
def accelerator() -> str:
    """The name of the compiled kernel of this machine's accelerator."""
    backend = jax.default_backend()
    if backend == "cpu":
        pytest.skip("needs a GPU or a TPU")
    return backend


@pytest.fixture
def found_race(capsys):
    """Says whether the TPU interpreter has found a race; jax 0.10 only prints it."""
    return lambda: "RACE DETECTED" in "".join(capsys.readouterr())


@pytest.fixture(autouse=True)
def no_race(request):
    """Fails a test whose kernels race; newer versions of jax raise by themselves."""
    if "test_interpret" in request.node.nodeid or "tpu_interpret" not in request.node.nodeid:
        yield
        return
    found_race = request.getfixturevalue("found_race")
    yield
    assert not found_race()
