"""Every loss in plain numpy, from its equation: what a trainer of another kind is held to."""
