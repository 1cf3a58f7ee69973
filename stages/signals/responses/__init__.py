"""Stage ``responses``: what a model answers to prompts -> ``responses``."""
