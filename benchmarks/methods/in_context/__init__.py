"""The experiment on in-context learning: its world, methods, recipes and page."""
