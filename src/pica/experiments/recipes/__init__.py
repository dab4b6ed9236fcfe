"""Recipes: their fields, how they are read, and what is wrong with one."""
