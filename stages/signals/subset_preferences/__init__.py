"""Stage ``subset_preferences``: how much subsets of the demonstrations help the teacher."""
