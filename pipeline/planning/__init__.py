"""What a recipe is, and what its steps are called by content."""
