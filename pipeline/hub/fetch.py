"""Fetch a data set of published tables into a folder, whole or not at all."""

import shutil
from pathlib import Path

from pipeline.hub.errors import in_one_line
from schemas.errors import ConfigError
from schemas.storage.manifest import MANIFEST


def fetch(name: str, folder: Path, *, revision: str | None) -> list[Path]:
    """Bring the tables of ``name`` (owner/name) to ``folder``; return each one's folder there.

    They come into ``FOLDER.unfinished`` first; a fetch that ended goes on there. Raises ConfigError
    for a folder that is there already and for a data set without tables.
    """
    from huggingface_hub import snapshot_download

    if folder.exists():
        raise ConfigError(
            f"{folder} is there already, and nothing is fetched over it: delete it, or name another"
        )
    work = folder.with_name(f"{folder.name}.unfinished")
    with in_one_line(name, "fetch"):
        snapshot_download(name, repo_type="dataset", revision=revision, local_dir=work)
    if not list(work.glob(f"*/*/{MANIFEST}")):
        shutil.rmtree(work)
        raise ConfigError(
            f"{name} has no table of teachercache: its folders hold no {MANIFEST}; correct the name"
        )
    shutil.rmtree(work / ".cache", ignore_errors=True)  # what huggingface_hub notes of downloads
    work.rename(folder)
    return sorted(path.parent for path in folder.glob(f"*/*/{MANIFEST}"))
