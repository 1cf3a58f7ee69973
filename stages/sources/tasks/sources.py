"""Where few-shot tasks come from: CrossFit, MetaICL, BIG-bench and LAMA files, or any table.

Every kind names its files by content, so that a fingerprint follows what is in them: a file's name
counts (it often holds the task's name), the folder it lies in does not.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from schemas.errors import ConfigError
from stages.sources.reading.source import (
    HubData,
    InputIdentity,
    Patterns,
    RowFiles,
    file_identity,
    find_files,
)
from stages.stage import StageConfig

Seed = Literal[13, 21, 42, 87, 100]
SEEDS: tuple[Seed, ...] = (13, 21, 42, 87, 100)
CROSSFIT_NAME = re.compile(
    r"(?P<task>.+)_(?P<size>[^_]+)_(?P<seed>\d+)_(?P<split>train|dev|test)\.tsv"
)


class TaskFiles(StageConfig):
    """Files, or folders that are searched through for files with the kind's ending."""

    ENDING: ClassVar[str]

    paths: Patterns

    def files(self) -> tuple[Path, ...]:
        """Return the files in reading order; raises ConfigError for a pattern without files."""
        return find_files(tuple(_searched(self.paths, self.ENDING)))

    def identity(self) -> list[InputIdentity]:
        """Return name, size and sha256 of each file, in reading order."""
        return [file_identity(path) for path in self.files()]

    def settings(self) -> dict[str, Any]:
        """Return what decides, beside the files, which tasks are read from them."""
        return self.model_dump(mode="json", exclude={"paths", "templates"})


class CrossFitFiles(TaskFiles):
    """CrossFit's ``<task>_<size>_<seed>_<split>.tsv``: input, a tab, output.

    The chosen seeds and splits of a task are one pool of examples (BiAlign merges train and dev).
    Options are the outputs that occur; CrossFit's multiple-choice tasks spell theirs inside the
    input, so they are ``generation`` here.
    """

    ENDING: ClassVar[str] = ".tsv"

    kind: Literal["crossfit"]
    task_kind: Literal["classification", "generation"]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = SEEDS
    splits: Annotated[tuple[Literal["train", "dev", "test"], ...], Field(min_length=1)] = (
        "train",
        "dev",
    )

    def files(self) -> tuple[Path, ...]:
        """Return the files of the chosen seeds and splits; raises ConfigError where none is."""
        found = super().files()
        chosen = tuple(path for path in found if self._is_chosen(path))
        if not chosen:
            raise ConfigError(
                f"none of the {len(found)} files in {', '.join(self.paths)} is of seeds "
                f"{list(self.seeds)} and splits {list(self.splits)}: choose others"
            )
        return chosen

    def _is_chosen(self, path: Path) -> bool:
        name = CROSSFIT_NAME.fullmatch(path.name)
        if name is None:
            raise ConfigError(
                f"{path}: expected a name like <task>_<size>_<seed>_<train|dev|test>.tsv"
            )
        return int(name["seed"]) in self.seeds and name["split"] in self.splits


class MetaIclFiles(TaskFiles):
    """MetaICL's jsonl with ``task``, ``input``, ``output`` and ``options`` on each line.

    A task without options is generation, with the same options in every row classification, else
    multiple choice.
    """

    ENDING: ClassVar[str] = ".jsonl"

    kind: Literal["metaicl"]


class BigBenchFiles(TaskFiles):
    """BIG-bench's ``task.json``: ``name`` and ``examples``; their prefixes are not used.

    These files forbid training on them: such a task may be a target and gives held-out episodes
    only.
    """

    ENDING: ClassVar[str] = ".json"

    kind: Literal["bigbench"]


class LamaFiles(TaskFiles):
    """LAMA's facts, one task a relation, with templates in ``templates`` (see ``lama.py``).

    ``labels`` are the objects of the relation, or of all relations of this source (``shared``, as
    the label set of In-context Tuning's code is).
    """

    ENDING: ClassVar[str] = ".jsonl"

    kind: Literal["lama"]
    templates: str
    labels: Literal["relation", "shared"] = "relation"

    def template_file(self) -> Path:
        """Return the file of templates; raises ConfigError where there is none, or several."""
        found = find_files((self.templates,))
        if len(found) > 1:
            raise ConfigError(f"templates: '{self.templates}' is {len(found)} files, expected one")
        return found[0]

    def files(self) -> tuple[Path, ...]:
        """Return the files of facts in reading order."""
        templates = self.template_file()
        return tuple(path for path in super().files() if path != templates)

    def identity(self) -> list[InputIdentity]:
        """Return name, size and sha256 of each file of facts, and of the templates."""
        return [*super().identity(), file_identity(self.template_file())]


class TableRows(StageConfig):
    """One task out of any table: which columns hold what.

    Several ``input`` columns are joined by a line break. ``options`` is the name of a column of
    lists, or the options themselves. ``label_names`` spells the integers of ``output``.
    """

    kind: Literal["rows"]
    name: Annotated[str, Field(min_length=1)]
    task_kind: Literal["classification", "multiple_choice", "generation"]
    source: Annotated[RowFiles | HubData, Field(discriminator="kind")]
    input: str | Annotated[tuple[str, ...], Field(min_length=1)]
    output: str
    options: str | tuple[str, ...] | None = None
    label_names: dict[int, str] | None = None

    @model_validator(mode="after")
    def _options_fit(self) -> "TableRows":
        if self.task_kind == "multiple_choice" and not isinstance(self.options, str):
            raise ValueError("multiple_choice needs 'options': the column that holds each row's")
        if self.task_kind == "generation" and self.options is not None:
            raise ValueError("a generation task has no options")
        return self

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The columns whose texts make the input."""
        return (self.input,) if isinstance(self.input, str) else self.input

    def identity(self) -> list[InputIdentity]:
        """Return what names the table by content."""
        return self.source.identity()

    def settings(self) -> dict[str, Any]:
        """Return what decides, beside the table, which task is read from it."""
        return self.model_dump(mode="json", exclude={"source": {"paths"}})


TaskSource = Annotated[
    CrossFitFiles | MetaIclFiles | BigBenchFiles | LamaFiles | TableRows,
    Field(discriminator="kind"),
]


def _searched(patterns: Sequence[str], ending: str) -> Iterator[str]:
    """Put the search through a folder in the place of each pattern that matches folders."""
    for pattern in patterns:
        found = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
        if any(path.is_dir() for path in found):
            yield f"{pattern}/**/*{ending}"
        if any(path.is_file() for path in found) or not found:
            yield pattern
