"""Where text comes from: local files (jsonl, json, parquet, arrow, text) or a hub data set."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from schemas.errors import ConfigError
from schemas.storage.files import sha256_of
from stages.hub import is_commit
from stages.stage import StageConfig

InputIdentity = dict[str, str | int]
Patterns = Annotated[tuple[str, ...], Field(min_length=1)]
COMPRESSIONS = {
    ".gz": b"\x1f\x8b",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ\0",
    ".lz4": b"\x04\x22\x4d\x18",
    ".zst": b"\x28\xb5\x2f\xfd",
}  # by file name, and the bytes such a file starts with


class RowFiles(StageConfig):
    """Files of rows; ``jsonl`` and ``json``, one array of objects, may be compressed."""

    kind: Literal["jsonl", "json", "parquet", "arrow"]
    paths: Patterns

    @property
    def is_json(self) -> bool:
        """Whether rows are JSON objects, which hold what they name and no null for the rest."""
        return self.kind in ("jsonl", "json")

    def files(self) -> tuple[Path, ...]:
        """Return the files in reading order; raises ConfigError for a pattern without files."""
        return find_files(self.paths)

    def identity(self) -> list[InputIdentity]:
        """Return name, size and sha256 of each file, in reading order."""
        return [file_identity(path) for path in self.files()]


class TableFiles(RowFiles):
    """Files of rows, one document a row."""

    column: str = "text"


class TextFiles(StageConfig):
    """Plain UTF-8 text: one document per line, per block between empty lines, or per file."""

    kind: Literal["text"]
    paths: Patterns
    sample_by: Literal["line", "paragraph", "document"]

    def files(self) -> tuple[Path, ...]:
        """Return the files in reading order; raises ConfigError for a pattern without files."""
        return find_files(self.paths)

    def identity(self) -> list[InputIdentity]:
        """Return name, size and sha256 of each file, in reading order."""
        return [file_identity(path) for path in self.files()]


class HubData(StageConfig):
    """A split of a data set of the hub.

    Its identity is the commit: a plan has it in the place of a branch or a tag, which move.
    """

    kind: Literal["hub"]
    name: str
    revision: Annotated[str, Field(min_length=1)]
    split: str
    config: str | None = None

    def files(self) -> tuple[Path, ...]:
        """Return no files: none is named."""
        return ()

    def identity(self) -> list[InputIdentity]:
        """Return the data set's name, configuration, split and commit."""
        assert is_commit(self.revision), "plans put commits in the place of branches"
        return [
            {"name": f"{self.name}/{self.config or ''}/{self.split}", "revision": self.revision}
        ]


class HubRows(HubData):
    """A data set of the hub, one document a row."""

    column: str = "text"


Source = Annotated[TableFiles | TextFiles | HubRows, Field(discriminator="kind")]


def find_files(patterns: Sequence[str]) -> tuple[Path, ...]:
    """Return the files of each pattern in turn, sorted within it, each file once."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        names = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        paths = [Path(name).absolute() for name in names if Path(name).is_file()]
        if not paths and names:
            raise ConfigError(
                f"'{pattern}' is a folder, expected files: name them, such as "
                f"'{pattern.rstrip('/')}/*.jsonl'"
            )
        if not paths:
            raise ConfigError(
                f"no file matches '{pattern}' (looked from {Path.cwd()}); check the path, "
                f"and that the data was fetched"
            )
        found.update(dict.fromkeys(paths))
    return tuple(found)


def file_identity(path: Path) -> InputIdentity:
    """Return what names a file's content wherever it lies."""
    return {"name": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)}
