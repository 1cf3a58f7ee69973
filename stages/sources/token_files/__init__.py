"""Stage ``token_files``: files of token ids -> ``documents`` or ``conversations``."""
