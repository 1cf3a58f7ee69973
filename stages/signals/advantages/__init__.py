"""Stage ``advantages``: how much an aligned teacher prefers each next token to its reference."""
