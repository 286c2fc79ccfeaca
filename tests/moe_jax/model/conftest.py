"""What tests of products share."""

import pytest

from moe_jax.model import ops

# (matrix units, wide vectors)
PROCESSORS = {"plain": (False, False), "wide vectors": (False, True), "matrix units": (True, True)}


@pytest.fixture(params=PROCESSORS.values(), ids=PROCESSORS.keys())
def any_processor(request, monkeypatch):
    """Products in the forms for each kind of processor: all are right on any."""
    matrix_units, wide_vectors = request.param
    monkeypatch.setattr(ops, "has_matrix_units", lambda: matrix_units)
    monkeypatch.setattr(ops, "has_wide_vectors", lambda: wide_vectors)
