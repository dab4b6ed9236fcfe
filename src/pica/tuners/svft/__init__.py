"""The PEFT method SVFT: its config, which entries it trains, the layer and the model."""
