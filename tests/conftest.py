"""Strict ground for every test: no silent promotion, several CPU devices, derandomised hypothesis."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("ci")
