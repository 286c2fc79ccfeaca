"""What tests of products share."""

import pytest

from moe_jax.model import ops


@pytest.fixture(params=[False, True], ids=["no matrix units", "matrix units"])
def matrix_units(request, monkeypatch):
    """Products in the forms for either kind of processor: both are right on any."""
    monkeypatch.setattr(ops, "has_matrix_units", lambda: request.param)
    return request.param
