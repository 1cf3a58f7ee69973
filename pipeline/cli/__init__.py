"""The ``teachercache`` command, a group of commands a file."""

from pipeline.cli import (
    audit,
    cache,
    hub,
    mend,
    models,
    recipes,
    report,
)  # each adds its commands to the app
from pipeline.cli.app import app, main

__all__ = ["app", "audit", "cache", "hub", "main", "mend", "models", "recipes", "report"]
