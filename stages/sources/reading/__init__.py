"""Texts out of files and the hub: read, cleaned, named by content, tokenised."""
