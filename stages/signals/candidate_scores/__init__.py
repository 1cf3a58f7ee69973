"""Stage ``candidate_scores``: the teacher's log-prob of each candidate answer."""
