"""One YAML file: a Recipe (all that changes bytes; hashed) and an Execution (where; never hashed).

Unknown keys are errors with their path.
"""

from datetime import date
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from schemas.errors import ConfigError
from schemas.storage.files import Folder, as_folder
from stages.models.spec import EngineOptions
from stages.registry import Step
from stages.stage import StageConfig
from stages.student.options import Sharding, Tracker


class ModelRef(StageConfig):
    """A model to run: a local folder, or the checkpoint that an earlier step makes.

    With ``revision`` (a commit, or a branch or tag) ``path`` is a name on the hub. ``adapter`` is
    the folder of a PEFT adapter on a ``path`` model. ``trust_remote_code`` lets the Python files
    that a ``path`` model brings run; it has to be said of a folder that brings some.
    """

    path: str | None = None
    revision: str | None = Field(default=None, min_length=1)
    step: str | None = None
    adapter: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    engine: Literal["vllm", "transformers"] = "vllm"
    trust_remote_code: bool | None = None

    @model_validator(mode="after")
    def _one_place(self) -> "ModelRef":
        if "" in (self.path, self.adapter):
            raise ValueError("got an empty text for a path, expected a model folder")
        if (self.path is None) == (self.step is None):
            raise ValueError("give either 'path' (a model folder) or 'step' (a step's name)")
        if self.revision is not None and self.path is None:
            raise ValueError("'revision' goes with 'path', a name on the hub")
        if self.adapter is not None and self.path is None:
            raise ValueError("'adapter' goes with 'path', the model folder it was trained on")
        if self.trust_remote_code and (self.path is None or self.adapter is not None):
            raise ValueError(
                "'trust_remote_code' goes with 'path' alone, a model folder that brings its code: "
                "merge an adapter into it beforehand"
            )
        return self

    @property
    def folder(self) -> Path:
        """The local folder of a ``path`` model."""
        assert self.path is not None
        return Path(self.path).expanduser()


def _root(place: object) -> object:
    if not isinstance(place, str | Folder):
        return place
    if place == "":
        raise ValueError("got an empty text, expected a folder or a place such as s3://bucket/x")
    try:
        folder = as_folder(place)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return folder.expanduser().absolute() if isinstance(folder, Path) else folder


Root = Annotated[Folder, BeforeValidator(_root), PlainSerializer(str)]


class Execution(StageConfig):
    """Where and how wide a recipe runs. Nothing here changes what is written.

    ``root`` is a folder, or a place in an object store such as ``s3://bucket/prefix``.
    ``address`` is a Ray cluster's (``auto``, ``host:port``, ``ray://host:port``); without one,
    executor ``ray`` starts a Ray of its own. A shard may cost ``max_attempts`` workers before its
    rows are looked at one by one; ``shard_timeout_s`` is how long a worker may take for one. A
    scheduler gives each of its tasks ``group_size`` shards. ``report_to`` are trackers that follow
    every training step. ``training_sharding`` ``full`` divides a student over the training
    processes, for students that do not fit into one.
    """

    root: Root = Field(default=Path("cache"), validate_default=True)
    executor: Literal["local", "ray"] = "local"
    address: str | None = None
    workers: int = Field(default=1, ge=1)
    training_processes: int = Field(default=1, ge=1)
    training_sharding: Sharding = "none"
    report_to: tuple[Tracker, ...] = ()
    group_size: int = Field(default=16, ge=1)
    max_attempts: int = Field(default=3, ge=1)
    shard_timeout_s: float | None = Field(default=None, gt=0.0)
    engine: EngineOptions = EngineOptions()


class Schedule(StageConfig):
    """When Airflow runs a recipe, and how hard it tries; ``airflow_dags`` reads it as it stands.

    Nothing here changes what is written, and variables are not put in. docs/guides/airflow.md tells
    what each setting does.
    """

    cron: str | None = None
    start_date: date = date(2026, 1, 1)
    catchup: bool = False
    max_active_runs: int = Field(default=1, ge=1)
    max_parallel_groups: int | None = Field(default=None, ge=1)
    tags: tuple[str, ...] = ()
    pool: str = "default_pool"
    retries: int = Field(default=3, ge=0)
    retry_delay_s: float = Field(default=60.0, gt=0.0)
    timeout_minutes: float | None = Field(default=None, gt=0.0)
    deadline_minutes: float | None = Field(default=None, gt=0.0)
    runner: Literal["local", "ray", "kubernetes"] = "local"


class Recipe(StageConfig):
    """What to make: models, and named steps in an order in which each finds what it needs."""

    NAME_PATTERN: ClassVar[str] = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"

    name: str = Field(pattern=NAME_PATTERN)
    models: dict[str, ModelRef] = Field(default_factory=dict)
    steps: dict[str, Step] = Field(min_length=1)
    execution: Execution = Execution()
    schedule: Schedule = Schedule()
