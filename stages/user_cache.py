"""The folder for what is remembered between runs: prepared models, hashes, start-up references."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return $TEACHERCACHE_CACHE, or ~/.cache/teachercache where that is not set."""
    return Path(os.environ.get("TEACHERCACHE_CACHE") or "~/.cache/teachercache").expanduser()
