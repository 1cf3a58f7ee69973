"""Stage ``token_entropies``: how unsure a model is at each position."""
