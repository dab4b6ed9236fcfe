"""Conversations and models: chat templates, what of a conversation is learnt, packing, and talking to a model."""
