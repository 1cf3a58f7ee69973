"""Finished tables, looked into and looked after."""
