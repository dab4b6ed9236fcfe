"""Experiments: a recipe, and what runs it."""
