"""Timed comparisons. Each script answers one question, prints a table and writes JSON into `benchmarks/results`."""
