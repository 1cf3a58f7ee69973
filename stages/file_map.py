"""A stage that maps pieces of files to the shards of a table: no shuffle, any worker makes any."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from stages.stage import Estimate, Kind, SourceStage, StageContext


@dataclass(frozen=True, slots=True)
class Piece:
    """What one shard of a ``FileMapStage`` is made of, known before a row is read.

    ``records`` says which records of which files, for the stage's own work; they are ``num_rows``.
    """

    split: str
    num_rows: int
    records: Any


PieceWork = Callable[[Piece], Iterable[Any]]


class FileMapStage(SourceStage):
    """A map from pieces of files to the shards of a table: each is made by itself, by any worker.

    Rows that hold the same as one of an earlier shard are left out once all shards are there.
    """

    KIND: ClassVar[Kind] = "table"

    @abstractmethod
    def pieces(self) -> Sequence[Piece]:
        """Return what each shard is made of, from the files' headers; train before held-out.

        Raises ConfigError for a file that is not what its format says.
        """

    @abstractmethod
    def estimate(self, pieces: Sequence[Piece], *, vocab_size: int) -> Estimate:
        """Foretell the size of the table."""

    @contextmanager
    def open(self, context: StageContext) -> Iterator[PieceWork]:
        """Load what the work needs once, yield what makes the rows of one piece."""
        with self.work.open_work(self, context) as work:
            yield work
