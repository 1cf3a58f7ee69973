"""A small recipe on real text and a tiny model, and ways to run it, for the pipeline's tests."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.cli import main
from pipeline.planning.plan import PlannedStep, make_plan
from pipeline.planning.recipe import Recipe
from pipeline.planning.recipe_file import load_recipe
from pipeline.state import step_state
from pipeline.steps.run import run_plan
from schemas.errors import TeacherCacheError
from schemas.storage.records import ShardRecord

LENGTH, ROWS_PER_SHARD = 48, 8
COMMAND = Path(sys.executable).with_name("teachercache")


@dataclass(frozen=True)
class TinyRecipe:
    """A recipe file and what lies around it."""

    path: Path
    root: Path

    def load(self, *overrides: str) -> Recipe:
        return load_recipe(self.path, overrides)

    def plan(self, *overrides: str) -> list[PlannedStep]:
        return make_plan(self.load(*overrides))

    def step(self, name: str, *overrides: str) -> PlannedStep:
        return next(step for step in self.plan(*overrides) if step.name == name)

    def copy(self, folder: Path, *, without: str = "") -> "TinyRecipe":
        """Return the same recipe with its own copy of all that was made, but for one table."""
        shutil.copytree(self.root, folder / "root", ignore=shutil.ignore_patterns(without))
        path = folder / "recipe.yaml"
        path.write_text(self.path.read_text().replace(str(self.root), str(folder / "root")))
        return TinyRecipe(path, folder / "root")

    def only(self, *names: str) -> "TinyRecipe":
        """Return the same recipe with none but these steps, on the same root."""
        body = yaml.safe_load(self.path.read_text())
        body["steps"] = {name: body["steps"][name] for name in names}
        path = self.path.with_name("only.yaml")
        path.write_text(yaml.safe_dump(body, sort_keys=False))
        return TinyRecipe(path, self.root)

    def run(self, *overrides: str) -> "Events":
        events = Events()
        recipe = self.load(*overrides)
        run_plan(make_plan(recipe), recipe.execution, events)
        return events


@dataclass
class Events:
    """A reporter that writes down what a run says."""

    states: dict[str, str] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    found: list[int] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def said(self, line: str) -> None:
        self.lines.append(line)

    def step_started(self, step: PlannedStep, progress: step_state.Progress) -> None:
        self.states[step.name] = progress.state

    def shards_expected(self, num_shards: int, num_finished: int) -> None:
        self.found.append(num_finished)

    def shard_finished(self, record: ShardRecord) -> None:
        self.made.append(record.name)

    def warned(self, line: str) -> None:
        self.warnings.append(line)

    def trained(self, values: dict[str, Any]) -> None:
        pass

    def step_finished(self, step: PlannedStep) -> None:
        self.finished.append(step.name)


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_recipe(
    folder: Path, model: Path, texts: Sequence[str], *, more_steps: Mapping[str, Any] | None = None
) -> TinyRecipe:
    """Write text and recipe into ``folder``; everything the recipe makes goes there too."""
    body = {
        "name": "tiny",
        "models": {"teacher": {"path": str(model), "dtype": "float32", "engine": "transformers"}},
        "steps": {
            "documents": {
                "stage": "ingest",
                "source": {"kind": "jsonl", "paths": [str(write_jsonl(folder / "a.jsonl", texts))]},
                "tokenizer": "teacher",
                "length": LENGTH,
                "mode": "pack",
                "heldout_fraction": 0.25,
                "rows_per_shard": ROWS_PER_SHARD,
            },
            "signals": {
                "stage": "teacher_logits",
                "input": "documents",
                "model": "teacher",
                "encoding": {"kind": "threshold", "k": 8},
            },
            **(more_steps or {}),
        },
        "execution": {
            "root": str(folder / "root"),
            "engine": {
                "device": "cpu",
                "num_threads": 1,  # what this process has: another number moves last bits
                "cache_dir": str(folder / "head_check"),
            },
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return TinyRecipe(path, folder / "root")


def edit_recipe(recipe: TinyRecipe, *keys: str, value: Any) -> None:
    """Set one value of the recipe file itself."""
    body = yaml.safe_load(recipe.path.read_text())
    place = body
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    recipe.path.write_text(yaml.safe_dump(body, sort_keys=False))


@dataclass(frozen=True)
class Said:
    """What a command line left: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr; fails where it is not exactly one."""
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n"), self.err
        return self.err.removeprefix("error: ").rstrip("\n")


def teachercache(*arguments: str | Path) -> Said:
    """Call the command line's ``main`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: str | int | None = 0
    before, sys.argv = sys.argv, ["teachercache", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    return Said(int(code or 0), out.getvalue(), err.getvalue())


def start(*arguments: str | Path, **env: str) -> subprocess.Popen[str]:
    """Start the installed command as the leader of a process group of its own."""
    return subprocess.Popen(
        [str(COMMAND), *map(str, arguments)],
        env={**os.environ, "COLUMNS": "200", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> Said:
    """Wait for a started command."""
    out, err = process.communicate(timeout=300)
    return Said(process.returncode, out, err)


def table_bytes(folder: Path) -> dict[str, bytes]:
    """Everything of a table that has to be equal between runs: shards, rejects and manifest."""
    patterns = ("shard-*.arrow", "shards.feather", "*.rejects.jsonl", "manifest.json", "head.*")
    return {path.name: path.read_bytes() for pattern in patterns for path in folder.glob(pattern)}


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file below ``root``, but the locks."""
    return {
        str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def error_of(recipe: TinyRecipe, *overrides: str) -> TeacherCacheError:
    """Return the error that planning raises."""
    try:
        recipe.plan(*overrides)
    except TeacherCacheError as error:
        assert str(error) and "\n" not in str(error), str(error)
        return error
    raise AssertionError("no error")
