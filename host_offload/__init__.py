"""Bytes, memory kinds and who computes; knows arrays, not models."""
