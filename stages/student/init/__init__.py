"""Stage ``student_init``: a teacher's own layers -> an untrained student."""
