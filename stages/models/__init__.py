"""A model: its folder, its numbers in torch, and engines that run it."""
