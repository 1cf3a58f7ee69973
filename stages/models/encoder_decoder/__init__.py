"""One encoder-decoder (T5) in torch: what its two halves read of a row, and its head's states."""
