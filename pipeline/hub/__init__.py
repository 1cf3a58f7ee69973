"""Finished tables on the hub: published whole under a name, fetched by it."""
