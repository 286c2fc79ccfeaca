"""Strict ground for every test: no silent promotion of dtypes or ranks, reproducible examples."""

import os
import signal
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from importlib.util import find_spec

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_LONGEST = {"scripts", "paged_attention"}
_NOT_OPTIMISED = "--xla_backend_optimization_level=0"

if find_spec("hypothesis"):  # scripts/gpu_check.py runs the other tests where it is not installed
    from hypothesis import settings

    settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
    settings.load_profile("ci")


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs when there are many: Linux gives a process 65,530 memory maps.

    A program of XLA:CPU takes a handful; past the limit, the compiler crashes.
    """
    yield
    if len(jax.devices()[0].client.live_executables()) > 1000:
        jax.clear_caches()


def pytest_configure(config):
    """Ctrl-C is heard, and calibrations stay out of the user's cache; both in scripts as well.

    A shell starts what runs in the background with Ctrl-C ignored. Programs are kept on disk while
    the tests run, so that what one test has compiled another, or another process, need not. Most of
    the time goes into compiling nevertheless; a quarter less if machine code is not optimised.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    flags = os.environ.get("XLA_FLAGS", "")
    if config.getoption("compile") == "quick" and _NOT_OPTIMISED not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_NOT_OPTIMISED}"
    if not hasattr(config, "workerinput"):  # the processes of pytest-xdist inherit these
        cache = tempfile.TemporaryDirectory(prefix="moe_jax_tests_")
        config.add_cleanup(cache.cleanup)
        os.environ["MOE_JAX_CACHE"] = cache.name
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(cache.name, "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # jax has read the environment by now where this process is the only one.
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_addoption(parser):
    parser.addoption(
        "--compile",
        choices=("quick", "served"),
        default="served",
        help="programs in machine code that is not optimised, or as they are served",
    )
    parser.addoption(
        "--require",
        metavar="MARKER",
        help="fail if no test with this marker could be collected, for want of packages",
    )


def pytest_collection_modifyitems(config, items):
    marker = config.getoption("--require")
    if marker and not any(item.get_closest_marker(marker) for item in items):
        raise pytest.UsageError(f"no {marker} test was collected; install the extra {marker!r}")
    # If the longest files came last, one process would wait for the other.
    items.sort(key=lambda item: not _LONGEST.intersection(item.path.parts))
