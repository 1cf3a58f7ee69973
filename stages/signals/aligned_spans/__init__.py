"""Stage ``aligned_spans``: a teacher's log-probs of text that is in other tokens."""
