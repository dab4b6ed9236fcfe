"""Text-to-image models of diffusers: what their training needs that no trainer knows."""
