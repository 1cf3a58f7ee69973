"""What a stage is. A stage *is* its frozen configuration: every field of it changes bytes.

A table stage maps input shard i to output shard i. ``open`` loads whatever the work needs (a model,
say) once per worker and yields the work: a function from one input shard to its output rows, in
order, with a ``Rejected`` in place of a row that cannot be made.

Where and how wide a stage runs is the ``StageContext``'s business and is never hashed.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from schemas.table import BoundTable, Table
from stages.engines.options import EngineOptions


class StageConfig(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error with its path."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that could not be made, and why: counted in the manifest, never replaced."""

    sample_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as a stage sees it: an ordinary transformers folder, a dtype and an engine."""

    path: Path
    dtype: str
    engine: Literal["vllm", "transformers"]
    hidden_size: int


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a worker is given beside the configuration: places and widths, nothing hashed.

    ``folder`` is the output table's folder, for files that lie beside its shards.
    """

    folder: Path
    vocab_size: int
    models: Mapping[str, ModelSpec] = field(default_factory=dict)
    engine: EngineOptions = field(default_factory=EngineOptions)


Work = Callable[[pa.Table], Iterable[Any]]


class TableStage(Protocol):
    """A map from the shards of one table to the shards of another."""

    VERSION: ClassVar[int]  # raise it when the same configuration gives other bytes
    CONSUMES: ClassVar[Table[Any]]

    @property
    def table(self) -> Table[Any]:
        """The table this stage writes."""

    @property
    def side_files(self) -> tuple[str, ...]:
        """Names of files that ``open`` writes beside the shards; they go into the manifest."""

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """The table with its vocabulary and fixed sizes known."""

    def open(self, context: StageContext) -> AbstractContextManager[Work]:
        """Load the model once; free it on exit."""
