"""Runs Mixture-of-Experts language models that are bigger than the accelerator's memory."""
