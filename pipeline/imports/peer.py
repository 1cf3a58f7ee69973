"""What the import of any peer's rows is told: which columns, what rows, what the numbers are."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt
import pyarrow as pa

from pipeline.imports.peer_files import PeerFile
from pipeline.imports.peer_row import PeerRow


class Peer(ABC):
    """A format; opened on a folder it refuses, by ConfigError, what it cannot follow."""

    is_renormalised: ClassVar[bool]  # whether log-probs sum to one over the K tokens

    @abstractmethod
    def __init__(self, folder: Path, files: list[PeerFile]) -> None:
        """Look at columns and settings, not at rows."""

    @property
    def settings(self) -> dict[str, Any]:
        """Whatever the folder says, beside its rows, of how they are read; it is hashed."""
        return {}

    @abstractmethod
    def columns(self, schema: pa.Schema) -> list[str]:
        """Return the columns of a file that are read."""

    @abstractmethod
    def leaves_out(self, labels: list[npt.NDArray[Any]]) -> bool:
        """Whether the labels of some rows leave tokens out that could be scored."""

    @abstractmethod
    def rows(self, record: Mapping[str, pa.Scalar]) -> list[PeerRow]:
        """Return the rows of a record; raises UnusableRecord with the reason for one that is none.

        They are not yet ``checked``.
        """
