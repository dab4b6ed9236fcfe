"""The PEFT method PICA: its config, who shares a matrix with whom, the layer and the model."""
