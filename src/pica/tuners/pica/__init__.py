"""PiCa: configuration, layer, model, experts."""
