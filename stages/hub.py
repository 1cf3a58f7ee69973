"""The hub: what commit a revision is, files of a commit in the cache, its refusals in one line.

Files lie in huggingface_hub's own cache. What is there whole is never asked for again, and without
a network that is all there is. The token is where huggingface_hub keeps it, and stays there.
"""

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from schemas.errors import ConfigError, StoreError, first_line

_COMMIT = re.compile("[0-9a-f]{40}")
_KINDS = {"model": "model", "dataset": "data set"}
_NO_NAME = {
    "model": "no local folder and no hub name (owner/name): correct it",
    "dataset": "no hub name (owner/name): local files are read by kind jsonl, parquet or arrow",
}


def is_commit(revision: str) -> bool:
    """Return whether a revision names one state for good, as a branch or a tag does not."""
    return _COMMIT.fullmatch(revision) is not None


@dataclass(frozen=True, slots=True)
class Repository:
    """A model or a data set by its name; ``place`` is what a message begins with."""

    name: str
    kind: Literal["model", "dataset"]
    place: str

    def commit_of(self, revision: str) -> str:
        """Ask the hub which commit a branch or a tag is; raises ConfigError where it is none."""
        from huggingface_hub import HfApi

        with self._in_one_line(revision):
            found = HfApi().repo_info(self.name, revision=revision, repo_type=self.kind).sha
        assert found is not None
        return found

    def fetch(self, commit: str, patterns: Sequence[str], *, top_only: bool = False) -> Path:
        """Return the folder of a commit in which all files that fit ``patterns`` are whole.

        ``top_only`` leaves out those in folders. Raises ConfigError for what is neither there nor
        here.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        what: Any = {
            "repo_type": self.kind,
            "revision": commit,
            "allow_patterns": list(patterns),
            "ignore_patterns": ["*/*"] if top_only else None,
        }
        with self._in_one_line(commit):
            try:
                folder = snapshot_download(self.name, local_files_only=True, **what)
            except LocalEntryNotFoundError:
                folder = snapshot_download(self.name, **what)
        return Path(folder)

    def file_names(self, commit: str) -> list[str]:
        """Return the names of all files of a commit, sorted; the list is kept in the cache too.

        Raises ConfigError where it is neither there nor here.
        """
        from huggingface_hub import get_cached_repo_tree, snapshot_download
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        where: Any = {"repo_type": self.kind, "revision": commit}
        with self._in_one_line(commit):
            try:
                tree = get_cached_repo_tree(self.name, **where)
            except CachedRepoTreeNotFoundError:
                snapshot_download(self.name, allow_patterns=["README.md"], **where)
                tree = get_cached_repo_tree(self.name, **where)
        return sorted(file.path for file in tree)

    @contextmanager
    def _in_one_line(self, revision: str) -> Iterator[None]:
        """Raise ConfigError, in one line, for what the hub or the network has to say."""
        import huggingface_hub.errors as hub
        from huggingface_hub.constants import HF_HUB_CACHE

        what = f"{self.place}: {self.name} at revision {revision}"
        kind = _KINDS[self.kind]
        try:
            yield
        except hub.HFValidationError as error:
            raise ConfigError(f"{self.place}: '{self.name}' is {_NO_NAME[self.kind]}") from error
        except hub.GatedRepoError as error:
            raise ConfigError(
                f"{what} is behind terms of use that this token has not accepted: accept them on "
                f"the {kind}'s page, and log in by `hf auth login` or HF_TOKEN"
            ) from error
        except hub.RepositoryNotFoundError as error:
            raise ConfigError(
                f"{what}: the hub has no such {kind}, or it is private: correct the name, or log "
                f"in by `hf auth login` or HF_TOKEN"
            ) from error
        except hub.RevisionNotFoundError as error:
            raise ConfigError(
                f"{what}: the hub has no such revision of it (any more): name another commit or "
                f"branch; what a branch was is written in hub_revisions.json in the root, delete "
                f"its line to take what it is today"
            ) from error
        except hub.HfHubHTTPError as error:
            raise ConfigError(f"{what} cannot be fetched: {first_line(error)}") from error
        except (
            OSError,
            hub.CachedRepoTreeNotFoundError,
            hub.HTTPError,  # type: ignore[attr-defined]  # httpx's own
        ) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    f"{what}: no space left in {HF_HUB_CACHE}: free some, or set HF_HOME to a "
                    f"folder on another disk, then run again; what was fetched is kept"
                ) from error
            raise ConfigError(
                f"{what} is not whole in the cache of this machine, and the hub cannot be reached "
                f"({_reason(error)}): fetch it where there is a network, or name local files"
            ) from error


def beneath(error: Exception) -> str:
    """Return the first cause, in one line: huggingface_hub's own words for it fill three."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)


def _reason(error: Exception) -> str:
    """Return why a file could not be fetched."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else beneath(error)
