"""What a stage is: a frozen configuration, every field of which changes bytes, and its work.

There are four kinds. A source makes the shards of a table from files. A table stage maps input
shard i to output shard i: ``open`` loads whatever the work needs (a model, say) once per worker and
yields the work, a function from one input shard to its output rows, in order, with a ``Rejected``
in place of a row that cannot be made and a ``Later`` in place of one that an engine need not wait
for. A source whose shards are pieces of its files, made each by itself, is of that kind too. The
others leave a folder: a checkpoint, which later steps may run, or a report.

A stage is a folder: ``stage.py`` says what it is, and planning loads it, so it has no torch;
``work.py`` beside it does it, and is loaded when the work begins. CONTRIBUTING.md adds one step by
step. Where and how wide a stage runs is the ``StageContext``'s business and is never hashed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import ConfigError
from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest
from schemas.storage.records import ShardRecord
from schemas.table import BoundTable, Table
from stages.models.checkpoints.checkpoint import require_whole
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
class Later:
    """A row of which the engine has done its part: ``make`` does the rest, beside its next work.

    It is called once, in another thread than the engine's, in the order of the rows, and returns
    the row or a ``Rejected``. Until then it holds ``num_bytes`` of memory.
    """

    make: Callable[[], Any]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a worker is given beside the configuration: places and widths, nothing hashed.

    ``folder`` is the output table's folder, for files beside its shards, ``input_table`` the name
    of the table that is read, ``input_folder`` where it lies, ``other_folders`` where other tables
    of ``READS`` lie. What ``open`` puts in ``notes`` goes into each record.
    """

    folder: Folder
    vocab_size: int
    models: Mapping[str, ModelSpec] = field(default_factory=dict)
    engine: EngineOptions = field(default_factory=EngineOptions)
    input_table: str = ""
    input_folder: Folder | None = None
    other_folders: tuple[Folder, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)


Kind = Literal["source", "table", "checkpoint", "report"]
Work = Callable[[pa.Table], Iterable[Any]]
OnProgress = Callable[[str], None]
OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class TableRef:
    """A table that a step reads: the step that writes it, its model, if any, and its ``inputs``."""

    step: str
    table: Table[Any]
    made_by: Mapping[str, Any] | None
    fingerprint: str = ""
    inputs: tuple[str, ...] = ()  # the fingerprints of the tables that it was made of


@dataclass(frozen=True, slots=True)
class StepJob:
    """What a step that leaves a folder is given beside its configuration.

    ``output`` is a folder of this machine that becomes the step's when all went well. ``tables``
    are in the order of ``READS``, ``models`` by the name that the recipe gives them.
    """

    output: Path
    fingerprint: str
    identity: Mapping[str, Any]
    tables: tuple[Folder, ...]
    models: Mapping[str, ModelSpec]
    said: OnProgress
    trained: OnEvent


class Stage(StageConfig, ABC):
    """What all stages have: what they are called, read and run, and where their work is."""

    KIND: ClassVar[Kind]
    VERSION: ClassVar[int]  # raise it when the same configuration gives other bytes
    NOT_HASHED: ClassVar[tuple[str, ...]] = ()
    READS: ClassVar[tuple[str, ...]] = ()  # settings that name steps whose tables are read
    RUNS: ClassVar[tuple[str, ...]] = ()  # settings that name models of those tables' tokenizer
    ALSO_RUNS: ClassVar[tuple[str, ...]] = ()  # models with a tokenizer of their own
    ENCODER_DECODERS: ClassVar[tuple[str, ...]] = ()  # of RUNS: what may name one; others may not
    TOKENIZER: ClassVar[str] = ""  # the setting that names its ids' tokenizer; "": as what it reads

    stage: str

    @property
    def work(self) -> Any:
        """The module ``work`` beside the one that declares the stage; it loads torch and more."""
        return import_module(f"{type(self).__module__.rpartition('.')[0]}.work")

    @property
    def has_audit(self) -> bool:
        """Whether an audit can make the stage's rows again; nothing heavy is loaded to say."""
        return find_spec(self._audit) is not None

    @property
    def audit(self) -> Any:
        """The module ``audit`` beside that, None of a stage whose rows no audit can make again."""
        return import_module(self._audit) if self.has_audit else None

    @property
    def _audit(self) -> str:
        return f"{type(self).__module__.rpartition('.')[0]}.audit"

    @property
    def adapts(self) -> str | None:
        """The model that the step's checkpoint is an adapter on; None: it is a whole model."""
        return None

    def goes_on_from(self, other: "Stage") -> bool:
        """Whether a step that leaves an adapter may train that of step ``other`` further."""
        return False

    def named(self, settings: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Yield each of some settings with each name that it holds; a dot leads into a part."""
        for setting in settings:
            value: Any = self
            for part in setting.split("."):
                value = getattr(value, part, None)
            for name in (value,) if isinstance(value, str) else value or ():
                yield setting, name

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content, without its tables and models."""
        config = self.model_dump(mode="json", exclude={"stage", *self.NOT_HASHED})
        return {"stage": self.stage, "version": self.VERSION, "config": config}

    def check(self, tables: Sequence[TableRef], models: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise ConfigError for what only this stage can judge; the line begins with a setting.

        ``tables`` are in the order of ``READS``, ``models`` the identities of those of ``RUNS``.
        """


class Prepared(Protocol):
    """What a source has ready to be written."""

    @property
    def shards(self) -> Sequence[Any]:
        """All shards to be, each with its ``split`` and ``rows``; train before held-out."""

    @property
    def rejects(self) -> Mapping[str, int]:
        """What was read and not kept, by reason."""

    @property
    def rejected(self) -> Sequence[Mapping[str, str]]:
        """The first of the records that were not kept: ``place``, ``reason`` and ``detail``."""


class SourceStage(Stage):
    """Files -> the shards of a table. ``tokenizer`` is a model's name or folder.

    Of the records read, ``max_rejected_fraction`` may be malformed: broken JSON, a missing column,
    a value of another type.
    """

    KIND: ClassVar[Kind] = "source"
    TOKENIZER: ClassVar[str] = "tokenizer"
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("max_rejected_fraction",)

    tokenizer: str
    max_rejected_fraction: float = Field(default=0.01, ge=0.0, le=1.0)

    @property
    @abstractmethod
    def table(self) -> Table[Any]:
        """The table this stage writes."""

    @abstractmethod
    def source_identity(self) -> dict[str, Any]:
        """Configuration fields as they are hashed: names of files replaced by their content."""

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content, that of its files with it."""
        body = super().hashed()
        body["config"] |= self.source_identity()
        return body | {"table": [self.table.name, self.table.version, self.table.variant]}

    def prepare(self, work_dir: Path, *, on_progress: OnProgress | None = None) -> Prepared:
        """Do all the work, in ``work_dir``; return at once where it is done already.

        ``on_progress`` is given a line of text each time a piece of the work is on disk. Starts
        afresh when the configuration, a file or the tokenizer is another one. Not for two processes
        at once.
        """
        prepared: Prepared = self.work.prepare(self, work_dir, on_progress or (lambda line: None))
        return prepared

    def read(self, work_dir: Path, index: int) -> Iterator[Any]:
        """Yield the rows of shard ``index`` of a prepared ``work_dir``."""
        yield from self.work.read(work_dir, index)

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """Token id width from the model's vocabulary."""
        return self.table.bind(vocab_size=context.vocab_size)


class TableStage(Stage):
    """A map from the shards of the table of step ``input`` to the shards of another."""

    KIND: ClassVar[Kind] = "table"
    READS: ClassVar[tuple[str, ...]] = ("input",)
    CONSUMES: ClassVar[tuple[Table[Any], ...]]  # any one of these
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("input", "max_rejected_fraction")

    input: str
    max_rejected_fraction: float = Field(default=0.01, ge=0.0, le=1.0)

    @property
    @abstractmethod
    def table(self) -> Table[Any]:
        """The table this stage writes."""

    @property
    def side_files(self) -> tuple[str, ...]:
        """Names of files that ``open`` writes beside the shards; they go into the manifest."""
        return ()

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content, the version of its table with it."""
        return super().hashed() | {
            "table": [self.table.name, self.table.version, self.table.variant]
        }

    def check(self, tables: Sequence[TableRef], models: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse a table that the stage does not read."""
        accepted = [table.name for table in self.CONSUMES]
        for ref in tables:
            if ref.table.name not in accepted:
                raise ConfigError(
                    f"input: step '{ref.step}' writes {ref.table.name}, this stage reads "
                    f"{' or '.join(accepted)}"
                )

    @abstractmethod
    def bind(self, context: StageContext) -> BoundTable[Any]:
        """The table with its vocabulary and fixed sizes known."""

    @abstractmethod
    def estimate(self, source: Manifest, *, hidden_size: int) -> "Estimate":
        """Foretell the size of the output for a finished input."""

    def measures(self, folder: Folder, shards: Sequence[ShardRecord]) -> Mapping[str, float]:
        """Return numbers about the whole table, once its shards are there, for its manifest."""
        return {}

    def write_side_files(self, context: StageContext) -> None:
        """Make ``side_files`` where no shard is left to make; raises what ``open`` does.

        The table's manifest names them. What follows from the models alone is made again, whatever
        lies there; what the shards were made by stays as it is.
        """
        if self.side_files:
            _admit(context)
            self.work.write_side_files(self, context)

    @contextmanager
    def open(self, context: StageContext) -> Iterator[Work]:
        """Load what the work needs once, yield what does one shard; free it on exit.

        Raises StoreError for a step's model whose files have changed since it was made.
        """
        _admit(context)
        with self.work.open_work(self, context) as work:
            yield work

    @contextmanager
    def open_live(self, context: StageContext) -> Iterator[Any]:
        """Load what makes rows once more for an audit, which writes nothing; see ``agreement``."""
        _admit(context)
        with self.audit.open_live(self, context) as ask:
            yield ask


def _admit(context: StageContext) -> None:
    for model in context.models.values():
        model.admit_code()
        for folder in filter(None, (model.local_base, model.local_adapter)):
            require_whole(folder)


class SignalStage(TableStage):
    """A map that runs ``model`` on the rows of its input."""

    RUNS: ClassVar[tuple[str, ...]] = ("model",)
    NOT_HASHED: ClassVar[tuple[str, ...]] = (*TableStage.NOT_HASHED, "model")

    model: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a table will come to: scores, and bytes on disk without the shards' own overhead."""

    num_positions: int
    num_bytes: int


class FolderStage(Stage):
    """A step that leaves a folder: a checkpoint or a report."""

    def make(self, job: StepJob) -> None:
        """Fill the folder, its ``checkpoint.json`` last."""
        for model in job.models.values():
            model.admit_code()
        self.work.make(self, job)
