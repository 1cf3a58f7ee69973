"""Folders of a user's with the names of our packages: ours are found, theirs stay theirs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.cached_data import make_cached_data
from tests.house.tree import REPOSITORY

NAMES = ("schemas", "stages", "pipeline")
OPENED = """
import sys
{first}
from teachercache import CachedDataset, open_dataset
dataset = open_dataset(sys.argv[1:], split="train")
assert isinstance(dataset, CachedDataset) and len(dataset[0]["input_ids_T"])
"""
THEIRS = "import pipeline, schemas, stages\nassert (schemas.MINE, stages.MINE, pipeline.MINE)\n"
IN_WORKERS = """
import pickle, sys
from torch.utils.data import DataLoader
from teachercache import open_dataset

if __name__ == "__main__":
    rows = open_dataset(sys.argv[1:], split="train")
    assert len(pickle.loads(pickle.dumps(rows))) == len(rows)
    loader = DataLoader(
        rows, batch_size=None, num_workers=1, multiprocessing_context="spawn", shuffle=False
    )
    seen = [row["sample_id"] for row in loader]
    assert seen == [rows[index]["sample_id"] for index in range(len(rows))]
    import schemas
    assert schemas.MINE
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packages of a user's, one for each name of ours."""
    folder = tmp_path_factory.mktemp("theirs")
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("MINE = True\n")
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = make_cached_data(tmp_path_factory.mktemp("data"))
    return [str(folder) for folder in data.tables("threshold")]


def run(folder: Path, code: str, tables: list[str], **environment: str) -> None:
    script = folder / "script.py"
    script.write_text(code)
    command = [sys.executable, str(script), *tables]
    paths = {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | paths | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["", THEIRS], ids=["on the path", "loaded"])
def test_tables_open_beside_a_users_packages(first: str, theirs: Path, tables: list[str]) -> None:
    run(theirs, OPENED.format(first=first) + THEIRS, tables)


def test_a_users_packages_may_come_later(theirs: Path, tables: list[str], tmp_path: Path) -> None:
    """Our names are never taken: what comes on the path after us is found all the same."""
    later = f"sys.path.insert(0, {str(theirs)!r})\n"
    run(tmp_path, OPENED.format(first="") + later + THEIRS, tables)


@pytest.mark.slow
def test_rows_reach_workers_that_are_started_anew(theirs: Path, tables: list[str]) -> None:
    run(theirs, IN_WORKERS, tables)


@pytest.mark.slow
def test_students_train_beside_a_users_packages(
    theirs: Path, tables: list[str], tmp_path: Path
) -> None:
    student = Path(tables[0]).parent / "student"
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from teachercache.student import KdConfig, TrainConfig, TrainOptions, train\n"
        "config = TrainConfig(objective=KdConfig(), max_steps=1, per_device_batch_size=4)\n"
        f"done = train(config, student=Path({str(student)!r}),\n"
        f"    data=list(map(Path, sys.argv[1:])), output=Path({str(tmp_path / 'out')!r}),\n"
        "    options=TrainOptions(num_workers=0))\n"
        "assert done.metrics['after']\n"
    )
    run(theirs, code + THEIRS, tables)


@pytest.mark.parametrize("command", [["-m", "teachercache"], ["-c"]], ids=["module", "script"])
def test_the_command_runs_where_a_user_has_such_folders(
    command: list[str], theirs: Path, tables: list[str]
) -> None:
    if command == ["-c"]:  # what the installed script does, with a path of the user's before it
        command = ["-c", "from teachercache.__main__ import main; main()"]
    done = subprocess.run(
        [sys.executable, *command, "inspect", tables[0]],
        cwd=theirs,
        env=os.environ | {"PYTHONPATH": str(theirs)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "documents" in done.stdout
