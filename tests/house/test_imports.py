"""Who imports what: heavy libraries at their sites alone, and none of them to plan."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.registry import STAGES
from stages.sources.finished_table.stage import FinishedTableStage
from stages.student.train.stage import TrainStage
from tests.house.tree import PACKAGES, REPOSITORY, imported, sources

OPENS_TOKENIZERS = "stages/models/checkpoints/tokenizer.py"
# Each heavy library, and the only places that may import it (a folder, or one file).
IMPORT_SITES = {
    "vllm": ("stages/models/engines/vllm_engine.py",),
    "ray": ("pipeline/executors/ray_cluster/",),
    "airflow": ("airflow_dags/",),
    "torch": ("stages/", "pipeline/executors/local/training.py", "schemas/torch_rows.py"),
    "transformers": ("stages/",),
    "tokenizers": (OPENS_TOKENIZERS,),
    "datasets": (
        *("stages/sources/", "stages/teacher/", "pipeline/exports/"),
        "stages/student/hf_trainer.py",
    ),
    "polars": ("stages/sources/",),
    "accelerate": ("stages/student/",),
    "trl": ("stages/teacher/trl_trainer.py",),
    "peft": (
        *("stages/teacher/trl_trainer.py", "stages/models/checkpoints/adapters.py"),
        "stages/student/lora.py",
    ),
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


def test_each_heavy_library_is_imported_where_the_table_says() -> None:
    for name, tree in sources():
        for library, _ in imported(tree):
            sites = IMPORT_SITES.get(library)
            assert sites is None or name.startswith(sites), f"{name} imports {library}"


def test_one_file_opens_tokenizers() -> None:
    """So that no text is ever encoded by one that was not held to its tokenizer.json."""
    opening = re.compile(r"\b(AutoTokenizer|PreTrainedTokenizer\w*|AutoProcessor|get_tokenizer)\b")
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            is_site = path.relative_to(REPOSITORY).as_posix() == OPENS_TOKENIZERS
            assert bool(opening.search(path.read_text())) == is_site, path


def test_one_file_opens_model_folders() -> None:
    """So that none runs a folder's own code unless the recipe says so."""
    sites = {
        f"stages/models/checkpoints/{name}.py" for name in ("own_code", "tokenizer", "adapters")
    }
    found = {
        path.relative_to(REPOSITORY).as_posix(): re.findall(
            r"(\w+)\.from_(?:pretrained|config)\(", path.read_text()
        )
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*.py")
    }
    assert {name for name, calls in found.items() if calls} == sites
    calls = {call for name in sites for call in found[name]}
    assert calls == {"kind", "PreTrainedTokenizerFast", "PeftModel"}  # none of the others runs any


def test_the_dags_import_nothing_of_ours() -> None:
    """Airflow's environment has none of it."""
    allowed = {"airflow", "httpx", "kubernetes", "yaml", *sys.stdlib_module_names}
    for path in (REPOSITORY / "airflow_dags").glob("*.py"):
        names = {name for name, _ in imported(ast.parse(path.read_text()))}
        foreign = {name for name in names - allowed if not name.startswith("teachercache_")}
        assert not foreign, f"{path} imports {foreign}"
    for name in (
        "teachercache_recipes",
        "teachercache_rounds",
        "teachercache_stages",
    ):  # read without Airflow, too
        tree = ast.parse((REPOSITORY / f"airflow_dags/{name}.py").read_text())
        light = {"yaml", "teachercache_rounds", "teachercache_stages", *sys.stdlib_module_names}
        assert {imported_name for imported_name, _ in imported(tree)} <= light


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
    sites = {"schemas/storage/object_path.py": {"fsspec"}, "schemas/torch_rows.py": {"torch"}}
    for name, tree in sources():
        assert "torch_rows" not in {module for module, _ in imported(tree)}, name
        if name.startswith("schemas/"):
            foreign = {module for module, level in imported(tree) if level == 0} - allowed
            expected = sites.get(name, set())
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


def test_the_work_of_every_stage_does_what_its_kind_calls() -> None:
    """But for tables that lie there finished: nothing is done for them."""
    called = {"source": ("prepare", "read"), "table": ("open_work",), "report": ("make",)}
    for stage in (each for each in STAGES if each is not FinishedTableStage):
        folder = Path(*stage.__module__.split(".")[:-1])
        work = ast.parse((REPOSITORY / folder / "work.py").read_text())
        defined = {node.name for node in work.body if isinstance(node, ast.FunctionDef)}
        makes = ("train",) if stage is TrainStage else ("make",)
        assert {*called.get(stage.KIND, makes)} <= defined, folder
