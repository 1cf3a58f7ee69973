"""Stage ``train``: a student and the tables of its objective -> a trained student."""
