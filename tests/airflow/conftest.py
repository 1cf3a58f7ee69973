"""Fixtures: Airflow with a home of its own, the DAGs of a folder of recipes, and a tiny recipe."""

import copy
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
DAGS = REPOSITORY / "airflow_dags"
HOME = Path(tempfile.mkdtemp(prefix="airflow-"))
COMMAND = os.environ.setdefault(
    "TEACHERCACHE_COMMAND", str(REPOSITORY / ".venv" / "bin" / "teachercache")
)
PYTHON = Path(shlex.split(COMMAND)[0]).with_name("python")  # of the command's environment
# Before Airflow is imported for the first time. The command's threads are one, for equal bytes.
os.environ.update(
    AIRFLOW_HOME=str(HOME),
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__DAGS_FOLDER=str(DAGS),
    AIRFLOW__CORE__UNIT_TEST_MODE="False",
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{HOME}/airflow.db",
    AIRFLOW__LOGGING__BASE_LOG_FOLDER=str(HOME / "logs"),
    TEACHERCACHE_CACHE=str(HOME / "teachercache"),
    OMP_NUM_THREADS="1",
    KMP_BLOCKTIME="0",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)
sys.path.extend([str(DAGS), str(Path(__file__).parent)])  # the first as Airflow does


def pytest_sessionfinish() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@dataclass(frozen=True)
class World:
    """A folder with a model and texts, and the recipe about them."""

    folder: Path
    body: dict[str, Any]
    _plain: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)

    def write(self, path: Path, root: Path, **changes: Any) -> Path:
        """Write the recipe with another root, and other values by their path: ``a__b=value``."""
        body = copy.deepcopy(self.body)
        body["execution"]["root"] = str(root)
        for key, value in changes.items():
            *parents, last = key.split("__")
            place = body
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(body, sort_keys=False))
        return path

    @property
    def table_steps(self) -> dict[str, Any]:
        """The steps that make tables."""
        return {name: self.body["steps"][name] for name in ("documents", "signals")}

    def plain_run(self, day: str) -> dict[str, dict[str, bytes]]:
        """Make a day's tables without Airflow, once for all tests; return every byte of them."""
        if day not in self._plain:
            root = self.folder / f"plain-{day}"
            path = self.write(root.with_suffix(".yaml"), root, steps=self.table_steps)
            teachercache("run", str(path), DS=day)
            self._plain[day] = tables(root)
        return self._plain[day]


def teachercache(*arguments: str, **environment: str) -> str:
    """Run the command to its good end; return what it prints."""
    done = subprocess.run(
        [*shlex.split(COMMAND), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tables(root: Path) -> dict[str, dict[str, bytes]]:
    """Return every byte that has to be equal between runs, by table folder."""
    patterns = ("shard-*.arrow", "*.rejects.jsonl", "manifest.json", "head.*")
    return {
        f"{folder.parent.name}/{folder.name}": {
            path.name: path.read_bytes() for pattern in patterns for path in folder.glob(pattern)
        }
        for group in ("documents", "teacher_logits")
        for folder in (root / group).glob("*")
    }


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny model and two days of text, made by the environment that has torch."""
    folder = tmp_path_factory.mktemp("world")
    done = subprocess.run(
        [str(PYTHON), str(Path(__file__).with_name("tiny_world.py")), str(folder)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return World(folder, yaml.safe_load(done.stdout))


@pytest.fixture(scope="session", autouse=True)
def database() -> None:
    """Airflow's own tables, in SQLite."""
    from airflow.utils.db import initdb

    initdb()


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of recipes that the DAGs are made of."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.setenv("TEACHERCACHE_RECIPES", str(folder))
    yield folder
