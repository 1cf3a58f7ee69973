"""The offline trainer: reads cached signals, never a teacher. Nothing here imports an engine."""
