"""Training a small model from scratch: a differentiable forward pass, losses, batches, export.

Knows nothing of serving: no pages, no host memory, no engine. Needs the `train` extra.
"""
