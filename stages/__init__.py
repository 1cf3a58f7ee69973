"""The work: from files to a trained student."""
