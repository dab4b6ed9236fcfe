"""What `pica analyze` does."""
