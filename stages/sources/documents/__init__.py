"""Stage ``ingest``: running text -> ``documents``."""
