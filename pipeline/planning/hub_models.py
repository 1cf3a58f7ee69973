"""Models by hub name: fetched by huggingface_hub into its own cache, from there on local folders.

A model's identity is its content, so where it came from is in no fingerprint. A branch or a tag is
looked up once and its commit written down beside the tables (``hub_revisions.json`` in the root):
whatever the branch does later, a recipe runs what it was planned with. What is in the cache whole
is never asked for again, and without a network that is all there is.

The token is where huggingface_hub keeps it, and stays there.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.planning.recipe import ModelRef, Recipe
from schemas.errors import ConfigError, first_line
from schemas.storage.files import Folder, read_if_there, write_text

REVISIONS = "hub_revisions.json"
_COMMIT = re.compile("[0-9a-f]{40}")
_READ = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")
_OLD_WEIGHTS = "pytorch_model*.bin"  # fetched where there are no others


def with_local_folders(recipe: Recipe) -> Recipe:
    """Return the recipe with a folder of this machine in the place of each hub name.

    Raises ConfigError where a model is not on the hub, or neither there nor here.
    """
    if all(ref.revision is None for ref in recipe.models.values()):
        return recipe
    models = {
        name: ref if ref.revision is None else _with_folder(ref, f"models.{name}", recipe)
        for name, ref in recipe.models.items()
    }
    return recipe.model_copy(update={"models": models})


def _with_folder(ref: ModelRef, place: str, recipe: Recipe) -> ModelRef:
    assert ref.path is not None and ref.revision is not None
    if ref.folder.exists():
        raise ConfigError(
            f"{place}.revision: {ref.path} is a local folder too, which has none: leave it out, or "
            f"run from another folder to mean the hub's"
        )
    commit = _commit_of(ref.path, ref.revision, place, recipe.execution.root)
    return ref.model_copy(update={"path": _fetched(ref.path, commit, place), "revision": None})


def _commit_of(name: str, revision: str, place: str, root: Folder) -> str:
    """Return the commit that a revision is, or was when it was first looked up for this root."""
    if _COMMIT.fullmatch(revision):
        return revision
    body = read_if_there(root / REVISIONS)
    written: dict[str, str] = json.loads(body) if body else {}
    key = f"{name}@{revision}"
    if key not in written:
        from huggingface_hub import HfApi

        with _in_one_line(name, revision, place):
            found = HfApi().repo_info(name, revision=revision).sha
        assert found is not None
        written[key] = found
        write_text(root / REVISIONS, json.dumps(written, indent=1, sort_keys=True) + "\n")
    return written[key]


def _fetched(name: str, commit: str, place: str) -> str:
    """Return the folder of a model in huggingface_hub's cache, whole."""
    folder = _snapshot(name, commit, place, _READ)
    if not any(Path(folder).glob("*.safetensors")):
        folder = _snapshot(name, commit, place, (*_READ, _OLD_WEIGHTS))
    return folder


def _snapshot(name: str, commit: str, place: str, patterns: Sequence[str]) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    what: Any = {
        "revision": commit,
        "allow_patterns": list(patterns),
        "ignore_patterns": ["*/*"],  # a model's files lie at the top, those of other kinds below
    }
    with _in_one_line(name, commit, place):
        try:
            folder = snapshot_download(name, local_files_only=True, **what)
        except LocalEntryNotFoundError:
            folder = snapshot_download(name, **what)
    return str(folder)


@contextmanager
def _in_one_line(name: str, revision: str, place: str) -> Iterator[None]:
    """Raise ConfigError, in one line, for what the hub or the network has to say."""
    import huggingface_hub.errors as hub

    what = f"{place}: {name} at revision {revision}"
    try:
        yield
    except hub.HFValidationError as error:
        raise ConfigError(
            f"{place}.path: '{name}' is no local folder and no hub name (owner/name): correct it"
        ) from error
    except hub.GatedRepoError as error:
        raise ConfigError(
            f"{what} is behind terms of use that this token has not accepted: accept them on the "
            f"model's page, and log in by `hf auth login` or HF_TOKEN"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{what}: the hub has no such model, or it is private: correct the name, or log in by "
            f"`hf auth login` or HF_TOKEN"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ConfigError(
            f"{what}: the hub has no such revision of it (any more): name another commit or "
            f"branch; what a branch was is written in {REVISIONS} in the root, delete its line to "
            f"take what it is today"
        ) from error
    except hub.HfHubHTTPError as error:
        raise ConfigError(f"{what} cannot be fetched: {first_line(error)}") from error
    except (OSError, hub.HTTPError) as error:  # type: ignore[attr-defined]  # httpx's own
        raise ConfigError(
            f"{what} is not whole in the cache of this machine, and the hub cannot be reached "
            f"({_reason(error)}): fetch it where there is a network, or name a local folder"
        ) from error


def _reason(error: Exception) -> str:
    """Return what lies beneath: huggingface_hub's own words for it fill three lines."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else first_line(error)
