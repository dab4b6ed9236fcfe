"""Runs the tests that PEFT ships against PiCa: local models, PiCa's rows for PEFT's case tables, and what is left out."""
