"""Bad records among good ones: a run passes over them and says which, or ends in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.steps.table_step import SOURCE_REJECTS
from tests.fixtures.tiny_recipe import teachercache

LIMIT = "max_rejected_fraction"
DOCUMENTS = [{"text": f"Document {i} speaks of {i * 7} things at some length."} for i in range(40)]
PAIRS = [
    {"prompt": f"Count to {i}.", "chosen": f"{i} it is.", "rejected": "No."} for i in range(40)
]
TASKS = [
    {"task": name, "input": f"{name} {i}", "output": "ab"[i % 2], "options": ["a", "b"]}
    for name in ("one", "two")
    for i in range(20)
]
BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "documents": (DOCUMENTS, "text"),
    "pairs": (PAIRS, "rejected"),
    "episodes": (TASKS, "output"),
}


def write(path: Path, records: list[dict[str, Any]], *bad: str) -> None:
    path.write_text("".join(f"{line}\n" for line in (*bad, *map(json.dumps, records))))


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    """Three sources, each of which has one line that is torn and one null among its records."""
    for name, (records, field) in BAD.items():
        write(tmp_path / f"{name}.jsonl", records, '{"torn": ', json.dumps({field: None}))
    files = {name: {"kind": "jsonl", "paths": [str(tmp_path / f"{name}.jsonl")]} for name in BAD}
    shared = {"tokenizer": "teacher", LIMIT: 0.05}
    steps = {
        "documents": shared
        | {"stage": "ingest", "source": files["documents"], "length": 16, "mode": "pack"}
        | {"heldout_fraction": 0.25},
        "pairs": shared
        | {"stage": "preference_pairs", "source": files["pairs"], "template": "plain"}
        | {"max_prompt_length": 60, "max_response_length": 60, "heldout_fraction": 0.25},
        "episodes": shared
        | {"stage": "episodes", "sources": [files["episodes"] | {"kind": "metaicl"}]}
        | {"targets": ["two"], "paradigm": "meta", "demonstrations": 2, "draw": "partition"}
        | {"support": 4, "max_length": 100},
    }
    body = {
        "name": "bad",
        "models": {"teacher": {"path": str(tiny_model), "dtype": "float32"}},
        "steps": steps,
        "execution": {"root": str(tmp_path / "root")},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def test_a_run_passes_over_bad_records_and_says_which(recipe: Path) -> None:
    assert teachercache("run", recipe).code == 0
    status = json.loads(teachercache("status", recipe, "--json").out)
    for step in status:
        folder, field = Path(step["folder"]), BAD[step["name"]][1]
        rejects = json.loads((folder / "manifest.json").read_text())["source_rejects"]
        lines = (folder / SOURCE_REJECTS).read_text().splitlines()
        found = {row["reason"]: row for row in map(json.loads, lines)}
        assert rejects["broken_json"] == 1
        assert found["broken_json"]["place"] == str(recipe.with_name(f"{step['name']}.jsonl:1"))
        other = next(reason for reason in found if reason != "broken_json")
        assert rejects[other] == 1 and found[other]["place"].endswith(".jsonl:2")
        assert field in found[other]["detail"] or "no column" in found[other]["detail"]
    assert "1 broken_json" in teachercache("status", recipe).out
    assert teachercache("verify", recipe).code == 0


@pytest.mark.parametrize("name", BAD)
def test_too_many_are_one_line_and_a_higher_limit_goes_on(name: str, recipe: Path) -> None:
    said = teachercache("run", recipe, "--step", name, "--set", f"steps.{name}.{LIMIT}=0.01")
    assert said.code == 3
    assert f"2 of 42 records are malformed, more than {LIMIT} 0.01" in said.error
    assert f"{name}.jsonl:" in said.error
    assert teachercache("run", recipe, "--step", name).code == 0


@pytest.mark.parametrize("name", BAD)
def test_a_format_that_is_wrong_as_a_whole_is_one_line(name: str, recipe: Path) -> None:
    write(recipe.with_name(f"{name}.jsonl"), [{"uno": "a", "dos": 2}] * 5, '{"torn": ')
    said = teachercache("run", recipe, "--step", name)
    assert said.code == 2
    assert "no column '" in said.error
    assert "it has 'uno', 'dos' (so are all 6 records read)" in said.error
