"""Engines here are told what experts cost: nothing depends on it."""

from tests.calibrations import known_costs  # noqa: F401
