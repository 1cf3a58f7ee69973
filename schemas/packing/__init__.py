"""The ``packed`` layout of ``threshold`` entries: record batches <-> entropy-coded ones."""
