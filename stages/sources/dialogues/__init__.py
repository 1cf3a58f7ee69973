"""Who said what, and the chat template that words it."""
