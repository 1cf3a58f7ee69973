"""What other programs captured of a teacher, read as tables of ours, a format a file."""
