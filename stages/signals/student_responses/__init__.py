"""Stage ``student_responses``: what a student answers to prompts -> ``responses``."""
