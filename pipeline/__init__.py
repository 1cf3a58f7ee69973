"""What to make, how far it is, who makes it where, what is told."""
