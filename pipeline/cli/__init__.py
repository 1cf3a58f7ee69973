"""The ``teachercache`` command, a group of commands a file."""

from pipeline.cli import cache, hub, mend, models, recipes, report  # each adds its commands
from pipeline.cli.app import app, main

__all__ = ["app", "cache", "hub", "main", "mend", "models", "recipes", "report"]
