"""MEND's distiller: demonstrations -> vectors; stage ``distiller_init``, and the frozen reader."""
