"""A trained adapter as a file: exact LoRA export for serving engines, import of the reference implementation's folders."""
