"""What a worker process does: it opens a stage once, then takes one job after another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

from pipeline.executors.shard_task import Task
from pipeline.executors.shard_work import run_shard, try_rows
from pipeline.planning.extras import extras_named
from schemas.errors import ConfigError, SchemaMismatch
from schemas.storage.records import ShardRecord
from schemas.tables import TABLES
from stages.file_map import FileMapStage
from stages.stage import StageContext, TableStage


@dataclass(frozen=True, slots=True)
class Job:
    """A shard to be written, or rows of one, to see whether a worker survives them.

    A probe writes nothing: it is only asked of a shard that has ended several workers. A copy is of
    a shard that another worker has in hand: its files are named ``suffix`` beyond the shard's own,
    as temporary ones are, until it turns out to be the first.
    """

    task: Task
    rows: range
    probe: bool = False
    suffix: str = ""

    def __str__(self) -> str:
        """Name the shard and, for a probe, the rows."""
        rows = f"{self.rows.start} to {self.rows.stop - 1}"
        return f"rows {rows} of {self.task.name}" if self.probe else self.task.name


Do = Callable[[Job], ShardRecord | None]


@contextmanager
def opened_worker(stage: TableStage | FileMapStage, context: StageContext) -> Iterator[Do]:
    """Open the stage; what it yields does one job and returns the record of what was written.

    Both raise ConfigError where a package is not installed, which a worker's machine may lack.
    """
    with extras_named(), stage.open(context) as work:
        bound = stage.bind(context)

        def do(job: Job) -> ShardRecord | None:
            with extras_named():
                if job.probe:
                    try_rows(job.task, job.rows, work)
                    return None
                return run_shard(job.task, bound, work, context.notes, suffix=job.suffix)

        yield do


@dataclass(frozen=True, slots=True)
class Versions:
    """What has to be equal on every machine of a run: this package, and each of its tables."""

    package: str
    tables: dict[str, int]

    @classmethod
    def installed(cls) -> "Versions":
        """Return the versions this process runs."""
        tables = {f"{name} {variant}".strip(): t.version for (name, variant), t in TABLES.items()}
        return cls(version("teachercache"), tables)

    def require(self, found: "Versions", host: str) -> None:
        """Raise, in one line, if a worker on ``host`` would write what this process does not."""
        if found.package != self.package:
            raise ConfigError(
                f"the worker on {host} has teachercache {found.package}, this run is "
                f"{self.package}: install {self.package} there, or run from a machine that has "
                f"{found.package}"
            )
        if found.tables != self.tables:
            name = min(key for key, _ in self.tables.items() ^ found.tables.items())
            raise SchemaMismatch(
                f"the worker on {host} writes table {name} in version "
                f"{found.tables.get(name, 'none')}, this run reads version "
                f"{self.tables.get(name, 'none')}: install the same teachercache on both"
            )
