"""Learning from rewards: what a model would be asked."""
