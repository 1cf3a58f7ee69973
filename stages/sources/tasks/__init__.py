"""Few-shot tasks out of files."""
