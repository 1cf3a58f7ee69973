"""Stage ``span_masks``: which tokens of each row are to be trained at, out of a user's files."""
