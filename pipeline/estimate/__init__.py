"""What a recipe will come to, found by a probe of its own steps: rows, bytes, time, memory."""
