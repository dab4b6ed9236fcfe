"""`pica basis`: a basis file for a base model."""
