"""Engines here are told what experts cost, since nothing depends on it; torch runs on one thread.

Its models are tiny: several threads would mostly wait for one another, and keep cores busy with it.
"""

from importlib.util import find_spec

from tests.calibrations import known_costs  # noqa: F401

if find_spec("torch"):
    import torch

    torch.set_num_threads(1)
