"""Pairs of answers and models: their tokens, and which of the two a model prefers."""
