"""Stage ``preference_pairs``: prompts with two responses -> ``preference_pairs``."""
