"""Stage ``teacher_logits``: what the teacher predicts at each position."""
