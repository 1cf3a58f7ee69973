"""Stage ``answers``: responses that pass filters -> ``conversations``."""
