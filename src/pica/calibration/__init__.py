"""Bases that look at data: text goes through a frozen model, and a basis file comes out."""
