"""What both methods are made of: tuner, layer, bank of shared matrices, configuration, verification, mixed batches."""
