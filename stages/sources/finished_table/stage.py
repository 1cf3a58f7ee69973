"""Stage ``finished_table``: a table that a recipe reads and does not make.

It is what its manifest says, wherever it lies: name and content of the step are those of whatever
made it, so steps that read it are called as they would be there.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from schemas.open_table import known_table
from schemas.storage.files import Folder, as_folder
from schemas.storage.manifest import Manifest, read_manifest
from schemas.table import Table
from stages.stage import Kind, Stage


class FinishedTableStage(Stage):
    """A finished table in ``folder``, on this machine or in an object store; there is no work."""

    KIND: ClassVar[Kind] = "source"
    VERSION: ClassVar[int] = 1

    stage: Literal["finished_table"]
    folder: str = Field(min_length=1)

    @property
    def place(self) -> Folder:
        """Where the table lies."""
        place = as_folder(self.folder)
        return place.expanduser().absolute() if isinstance(place, Path) else place

    @property
    def manifest(self) -> Manifest:
        """What it says of itself; raises StoreError where there is no finished table."""
        return read_manifest(self.place)

    @property
    def table(self) -> Table[Any]:
        """What its rows are; raises SchemaMismatch for one of another version."""
        return known_table(self.manifest, self.place)
