"""What a stage is. A stage *is* its frozen configuration: every field of it changes bytes.

A source stage makes the shards of a table from files. A table stage maps input shard i to output
shard i: ``open`` loads whatever the work needs (a model, say) once per worker and yields the work,
a function from one input shard to its output rows, in order, with a ``Rejected`` in place of a row
that cannot be made. A stage that makes a checkpoint instead derives from ``StageConfig`` alone.

To add a stage: a class of one of these kinds, its table in ``schemas`` (and in ``TABLES`` there),
and its name in the ``Step`` of ``pipeline.recipe``.

Where and how wide a stage runs is the ``StageContext``'s business and is never hashed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from stages.models.spec import EngineOptions, ModelSpec


class StageConfig(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error with its path."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that could not be made, and why: counted in the manifest, never replaced."""

    sample_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a worker is given beside the configuration: places and widths, nothing hashed.

    ``folder`` is the output table's folder, for files that lie beside its shards, ``input_table``
    the name of the table that is read.
    """

    folder: Folder
    vocab_size: int
    models: Mapping[str, ModelSpec] = field(default_factory=dict)
    engine: EngineOptions = field(default_factory=EngineOptions)
    input_table: str = ""


Work = Callable[[pa.Table], Iterable[Any]]
OnProgress = Callable[[str], None]


class Prepared(Protocol):
    """What a source has ready to be written."""

    @property
    def shards(self) -> Sequence[Any]:
        """All shards to be, each with its ``split`` and ``rows``; train before held-out."""

    @property
    def rejects(self) -> Mapping[str, int]:
        """What was read and not kept, by reason."""


class SourceStage(StageConfig, ABC):
    """Files -> the shards of a table. ``tokenizer`` is a model's name or folder."""

    VERSION: ClassVar[int]  # raise it when the same configuration gives other bytes
    NOT_HASHED: ClassVar[tuple[str, ...]] = ()

    tokenizer: str

    @property
    @abstractmethod
    def table(self) -> Table[Any]:
        """The table this stage writes."""

    @abstractmethod
    def source_identity(self) -> dict[str, Any]:
        """Configuration fields as they are hashed: names of files replaced by their content."""

    @abstractmethod
    def prepare(self, work_dir: Path, *, on_progress: OnProgress | None = None) -> Prepared:
        """Do all the work, in ``work_dir``; return at once where it is done already."""

    @abstractmethod
    def read(self, work_dir: Path, index: int) -> Iterator[Any]:
        """Yield the rows of shard ``index`` of a prepared ``work_dir``."""

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """Token id width from the model's vocabulary."""
        return self.table.bind(vocab_size=context.vocab_size)


class TableStage(StageConfig, ABC):
    """A map from the shards of the table of step ``input`` to the shards of another."""

    VERSION: ClassVar[int]  # raise it when the same configuration gives other bytes
    CONSUMES: ClassVar[tuple[Table[Any], ...]]  # any one of these
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("input", "model", "max_rejected_fraction")

    input: str
    model: str
    max_rejected_fraction: float = Field(default=0.01, ge=0.0, le=1.0)

    @property
    @abstractmethod
    def table(self) -> Table[Any]:
        """The table this stage writes."""

    @property
    def side_files(self) -> tuple[str, ...]:
        """Names of files that ``open`` writes beside the shards; they go into the manifest."""
        return ()

    @property
    def partner_models(self) -> tuple[str, ...]:
        """Models beside ``model`` that read the same token ids: their tokenizers have to agree."""
        return ()

    @property
    def other_models(self) -> tuple[str, ...]:
        """Models beside ``model`` that change bytes; they need not share its tokenizer."""
        return ()

    @abstractmethod
    def bind(self, context: StageContext) -> BoundTable[Any]:
        """The table with its vocabulary and fixed sizes known."""

    @abstractmethod
    def estimate(self, source: Manifest, *, hidden_size: int) -> "Estimate":
        """Foretell the size of the output for a finished input."""

    @abstractmethod
    def open(self, context: StageContext) -> AbstractContextManager[Work]:
        """Load the model once; free it on exit."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a table will come to: scores, and bytes on disk without the shards' own overhead."""

    num_positions: int
    num_bytes: int
