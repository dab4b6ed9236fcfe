"""What `pica evaluate` does."""
