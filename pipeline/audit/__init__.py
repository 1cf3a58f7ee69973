"""A cache held to its live teacher: a sample of rows made again, and compared."""
