"""Stage ``teacher_align``: preference pairs -> an aligned teacher."""
