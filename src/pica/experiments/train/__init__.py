"""What `pica train` does."""
