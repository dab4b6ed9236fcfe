"""What `pica merge` does."""
