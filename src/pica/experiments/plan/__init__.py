"""What `pica plan` does."""
