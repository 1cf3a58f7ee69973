"""Engines run a model and give back its final hidden states."""
