"""Responses to prompts: what a model wrote, and what models say of their tokens."""
