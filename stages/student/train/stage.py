"""Stage ``train``: what a training run is.

Every field of ``TrainConfig`` moves the weights and is hashed; where a run happens
(``TrainOptions``) changes no more than the last bits and is not.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from schemas.errors import ConfigError
from stages.models.encoder_decoder.kind import kinds_problem
from stages.models.spec import is_one_model
from stages.stage import Kind, Stage, StageConfig, TableRef
from stages.student.lora import LoraSettings
from stages.student.objectives import ObjectiveConfig
from stages.student.objectives.kd import KdConfig
from stages.student.objectives.mend import MendConfig
from stages.student.packages import Package

# What transformers needs of each: the module that brings it.
FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


class EarlyStopping(StageConfig):
    """Held-out rows are measured ``every`` so many steps: by KL to the teacher where there is one.

    Training stops when ``patience`` measurements in a row were not lower than the lowest by more
    than ``min_delta``, and the weights of the lowest are kept, however training ended.
    """

    patience: int = Field(ge=1)
    every: int = Field(ge=1)
    min_delta: float = Field(default=0.0, ge=0.0)


class TrainConfig(StageConfig):
    """A run over cached data: give ``max_steps`` or ``epochs``, not both.

    A step takes ``per_device_batch_size * gradient_accumulation_steps`` rows, on one process or
    divided over several (``share``), and its loss is the mean over their scored tokens (ICL and
    preference losses: over the rows), however they fall into batches and processes.
    ``dtype`` is that of the matrix products; weights and optimizer state are float32, but for
    ``adamw_8bit``. ``adafactor`` takes ``lr`` as it stands and keeps sums of rows and columns.
    ``warmup`` is a share of all steps. With ``packing`` the rows of a batch lie end to end, each
    read as if alone, instead of side by side and padded to the longest. With ``lora`` an adapter is
    trained and saved, and the student's own weights are left as they are.

    Training rows of the first table that lack a row in another one are left out and counted; beside
    those that the other tables say they rejected, ``max_missing_fraction`` of all may.
    """

    # Settings that came later: runs that leave them as they are keep their names.
    LATER: ClassVar[tuple[str, ...]] = (
        "lora",
        "optimizer",
        "early_stopping",
        "attn_implementation",
    )

    objective: ObjectiveConfig = KdConfig()
    lr: float = Field(default=3e-4, gt=0.0)
    max_steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0.0)
    per_device_batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: float = Field(default=0.01, ge=0.0)
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    packing: bool = False
    lora: LoraSettings | None = None
    optimizer: Literal["adamw", "adafactor", "adamw_8bit"] = "adamw"
    early_stopping: EarlyStopping | None = None
    attn_implementation: Literal[
        "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "sdpa"
    seed: int = Field(default=0, ge=0)
    max_missing_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give either 'max_steps' or 'epochs'")
        return self

    @model_validator(mode="after")
    def _packing_where_rows_are_single(self) -> "TrainConfig":
        if self.packing and not self.objective.PACKS:
            raise ValueError(
                f"packing: objective '{self.objective.loss}' reads several sequences of a row; set "
                f"packing to false"
            )
        return self

    @model_validator(mode="after")
    def _flash_in_half(self) -> "TrainConfig":
        if self.attn_implementation in FLASH and self.dtype == "float32":
            raise ValueError(
                f"attn_implementation: {self.attn_implementation} takes no float32: set dtype to "
                f"bfloat16"
            )
        if self.attn_implementation != "sdpa" and self.objective.USES_READER:
            raise ValueError(
                f"attn_implementation: objective '{self.objective.loss}' trains a distiller, which "
                f"has sdpa alone: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _stopping_in_time(self) -> "TrainConfig":
        stopping, steps = self.early_stopping, self.max_steps
        if stopping is not None and steps is not None and stopping.every > steps:
            raise ValueError(
                f"early_stopping.every is {stopping.every} and max_steps {steps}: nothing would be "
                f"measured, lower it"
            )
        return self

    @model_validator(mode="after")
    def _lora_on_a_student(self) -> "TrainConfig":
        if self.lora is not None and self.objective.USES_READER:
            raise ValueError(
                f"lora: objective '{self.objective.loss}' trains a distiller, whose adapter is "
                f"lora_rank of its distiller_init: set that, and leave lora out"
            )
        return self

    def settings(self) -> dict[str, Any]:
        """Return what decides the weights, without what came later and is left as it was."""
        left = {name for name in self.LATER if getattr(self, name) == self.default_of(name)}
        left.add("max_missing_fraction")
        return self.model_dump(mode="json", include=set(TrainConfig.model_fields) - left)

    def packages(self) -> Iterator[Package]:
        """Yield what the settings need beside the trainer's own packages."""
        if self.lora is not None:
            yield Package("lora", ("peft",), "teachercache[align]")
        if self.attn_implementation in FLASH:
            setting = f"attn_implementation: {self.attn_implementation}"
            module = FLASH[self.attn_implementation]
            yield Package(setting, (module,), "flash-attention of that version")
        if self.optimizer == "adamw_8bit":
            yield Package("optimizer: adamw_8bit", ("bitsandbytes",), "bitsandbytes")

    @classmethod
    def default_of(cls, name: str) -> Any:
        """Return a setting's default."""
        return cls.model_fields[name].default

    def require_shards(self, num_processes: int) -> None:
        """Raise ConfigError where the student cannot be divided over this many processes."""
        if num_processes < 2:
            problem = "training_processes is 1: give it two or more"
        elif not self.objective.SHARDS:
            problem = (
                f"objective '{self.objective.loss}' is not one forward of the student a batch, and "
                f"the processes have to run a divided one together: use kd, cross_entropy, sft, "
                f"dckd, adpa or opd"
            )
        elif self.lora is not None:
            problem = "lora trains few weights and holds the student's whole: leave one of them out"
        elif self.early_stopping is not None:
            problem = "early_stopping keeps whole weights again and again: leave one of them out"
        elif self.optimizer != "adamw":
            problem = f"optimizer '{self.optimizer}' reads whole weights: take adamw"
        else:
            return
        raise ConfigError(f"execution.training_sharding is full, but {problem}")

    @property
    def rows_per_step(self) -> int:
        """The rows of one step, over all processes."""
        return self.per_device_batch_size * self.gradient_accumulation_steps

    def share(self, num_processes: int) -> tuple[int, int]:
        """Return the rows of a batch and the batches of a step on each of several processes.

        Accumulated batches are dealt out first, then batches are made smaller. Raises ConfigError
        where the rows of a step cannot be divided.
        """
        batch_size, accumulation = self.per_device_batch_size, self.gradient_accumulation_steps
        dealt = math.gcd(accumulation, num_processes)
        smaller, left = divmod(batch_size, num_processes // dealt)
        if left:
            raise ConfigError(
                f"a step of {batch_size} x {accumulation} = {self.rows_per_step} rows "
                f"(per_device_batch_size x gradient_accumulation_steps) cannot be divided over "
                f"{num_processes} processes: take a number of processes that divides it"
            )
        return smaller, accumulation // dealt


class TrainStage(TrainConfig, Stage):
    """Train ``student`` (a checkpoint step or a model) on the joined rows of the ``data`` tables.

    ``data`` names the documents or episodes step first, then the signal steps; for ``kd`` so again
    for each further data set with signals of its own. ``lm_data`` are the running text and its
    signals, for the LM part of ``icl_distillation`` and for nothing else.
    ``reader`` names the model that reads a distiller's vectors, for ``mend`` alone.
    Held-out shards are never trained on: they measure the student before and after.
    With ``rounds`` the tables of ``data`` that ``student`` makes are made anew, by what the round
    before trained, and trained on so often (``pipeline.planning.rounds``).
    """

    KIND: ClassVar[Kind] = "checkpoint"
    VERSION: ClassVar[int] = 2
    NOT_HASHED: ClassVar[tuple[str, ...]] = (
        *("student", "data", "lm_data", "reader"),
        *("max_missing_fraction", "rounds"),
    )
    READS: ClassVar[tuple[str, ...]] = ("data", "lm_data")
    RUNS: ClassVar[tuple[str, ...]] = ("student", "reader")
    ENCODER_DECODERS: ClassVar[tuple[str, ...]] = ("reader",)

    stage: Literal["train"]
    student: str
    data: tuple[str, ...] = Field(min_length=1)
    lm_data: tuple[str, ...] = ()
    reader: str | None = None
    rounds: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _text_where_used(self) -> "TrainStage":
        if problem := self.objective.lm_data_problem(len(self.lm_data)):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _reader_where_used(self) -> "TrainStage":
        if self.objective.USES_READER and self.reader is None:
            raise ValueError(
                f"objective '{self.objective.loss}' needs 'reader', the model that reads the "
                f"distiller's vectors: name it"
            )
        if self.reader is not None and not self.objective.USES_READER:
            raise ValueError(
                f"'reader' is '{self.reader}', which objective '{self.objective.loss}' would not "
                f"use: leave it out, or use mend"
            )
        return self

    @property
    def adapts(self) -> str | None:
        """The student, where the step leaves an adapter on it."""
        return self.student if self.lora is not None else None

    def goes_on_from(self, other: Stage) -> bool:
        """Whether the adapter of step ``other`` may be trained further by this one."""
        if not isinstance(other, TrainStage) or other.lora is None or self.lora is None:
            return False
        return self.lora.goes_on_from(other.lora)

    def check(self, tables: Sequence[TableRef], models: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse tables that are not what the objective reads, or a reader that is not the teacher.

        ``cross_model`` of the objective allows another one.
        """
        kinds = [(ref.table.name, ref.table.variant) for ref in tables]
        self.objective.require(kinds[: len(self.data)], kinds[len(self.data) :])
        self.objective.check(tables)
        if isinstance(self.objective, KdConfig):
            self.objective.require_scorer(tables, models[self.student])
        if not isinstance(self.objective, MendConfig) or self.reader is None:
            return
        reader = models[self.reader]
        made_by = {table.step: table.made_by for table in tables if table.made_by is not None}
        if problem := kinds_problem(reader, made_by):
            raise ConfigError(f"reader: '{self.reader}' {problem}")
        others = [step for step, model in made_by.items() if not is_one_model(model, reader)]
        if others and not self.objective.cross_model:
            raise ConfigError(
                f"reader: '{self.reader}' is not the model that made '{others[0]}': name that one, "
                f"or set objective.cross_model to true, which every report then says"
            )
        if made_by and not others and self.objective.cross_model:
            raise ConfigError(
                f"objective.cross_model: is true, and reader '{self.reader}' is the very model "
                f"that made '{next(iter(made_by))}': leave it out"
            )

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content, with how many of its tables are running text.

        A run of one step warms up no more; those that did trained nothing.
        """
        hashed = super().hashed()
        for name in ("packing", *self.LATER):
            if getattr(self, name) == self.default_of(name):
                del hashed["config"][name]
        text = {"lm_inputs": len(self.lm_data)} if self.lm_data else {}
        warms_up_no_more = self.max_steps == 1 and self.warmup > 0
        return hashed | text | ({"warmup_steps": 0} if warms_up_no_more else {})
