"""A PiCa adapter as a LoRA that engines load."""
