"""Cached rows -> batches."""
