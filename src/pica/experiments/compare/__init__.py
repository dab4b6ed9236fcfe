"""What `pica compare` does."""
