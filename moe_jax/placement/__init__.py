"""Deciding where experts live and run; pure data in, data out."""
