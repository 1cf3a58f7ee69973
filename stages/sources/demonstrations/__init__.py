"""Stage ``demonstrations``: documents or episodes -> what teacher and distiller read."""
