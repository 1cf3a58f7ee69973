"""Stage ``episodes``: few-shot tasks -> ``episodes``."""
