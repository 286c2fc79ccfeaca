"""Strict ground for every test: no silent promotion of dtypes or ranks, reproducible examples."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption(
        "--no-skipped-golden",
        action="store_true",
        help="fail if the comparison with Transformers cannot run",
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--no-skipped-golden"):
        golden = [item for item in items if item.get_closest_marker("golden")]
        if not golden:
            raise pytest.UsageError("no golden test was collected; install the golden extra")
