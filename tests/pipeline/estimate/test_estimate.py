"""Estimates of three tiny recipes, held to what their runs leave, and sources read in part."""

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.estimate import source_sample
from pipeline.estimate.source_sample import sample_of
from pipeline.state.step_state import finished_manifest
from stages.sources.reading.source import TableFiles, TextFiles
from tests.conftest import save_tiny_model
from tests.fixtures.tiny_recipe import (
    EVERY_KIND,
    TinyRecipe,
    edit_recipe,
    make_recipe,
    stamps,
    teachercache,
    write_jsonl,
)
from tests.runs.test_icl_recipe import write_task


def estimated(recipe: TinyRecipe) -> dict[str, Any]:
    said = teachercache("plan", recipe.path, "--estimate", "--json")
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def held_to_a_run(recipe: TinyRecipe) -> dict[str, Any]:
    """Estimate, run, and compare every table: rows and tokens, bytes within a quarter."""
    found = estimated(recipe)
    assert not recipe.root.exists() or not list(recipe.root.rglob("*.arrow"))
    assert teachercache("run", recipe.path).code == 0
    steps = {step["name"]: step for step in found["steps"]}
    for step in recipe.plan():
        manifest = finished_manifest(step) if step.writes_table else None
        if manifest is None:
            continue
        guess = steps[step.name]
        assert guess["num_rows"] == pytest.approx(manifest.num_rows, rel=0.1), step.name
        assert guess["num_tokens"] == pytest.approx(manifest.num_tokens, rel=0.1), step.name
        beside = sum((step.folder / name).stat().st_size for name in manifest.files)
        real = manifest.num_bytes + beside
        assert guess["num_bytes"] == pytest.approx(real, rel=0.25), step.name
        assert guess["left_bytes"] == guess["num_bytes"] and guess["seconds"] > 0
    again = estimated(recipe)
    assert again["left_bytes"] == 0 and again["seconds"] == 0 and not again["unknown"]
    return steps


@pytest.mark.slow
def test_documents_with_all_kinds_of_steps(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    steps = held_to_a_run(make_recipe(tmp_path, tiny_model, paragraphs[:80], more_steps=EVERY_KIND))
    assert steps["distilled"]["found_by"] == "2 of 2 steps"
    assert steps["signals"]["memory"]["head"] == 512 * 64 * 4


@pytest.mark.slow
def test_documents_of_which_the_probe_sees_a_part(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher runs on a tenth of the rows, the source is read in part."""
    monkeypatch.setattr("pipeline.estimate.probed_plan.PROBE_TOKENS", 2400)
    monkeypatch.setattr(source_sample, "HALF_BYTES", 12_000)
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:200])
    found = estimated(recipe)
    assert teachercache("run", recipe.path).code == 0
    for guess, step in zip(found["steps"], recipe.plan(), strict=True):
        manifest = finished_manifest(step)
        assert manifest is not None
        spread = max(2 * guess["spread"], 0.15)
        assert guess["num_rows"] == pytest.approx(manifest.num_rows, rel=spread)
        assert guess["num_bytes"] == pytest.approx(manifest.num_bytes, rel=max(0.25, spread))
    assert "of the source's bytes" in found["steps"][0]["found_by"]
    probed_rows = int(found["steps"][1]["found_by"].split()[0])
    assert 16 <= probed_rows < 80


@pytest.mark.slow
def test_pairs_with_every_signal_of_two_teachers(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    aligned = save_tiny_model(tmp_path / "aligned", vocab_size=512, tie=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tiny_model / name).is_file():
            (aligned / name).write_bytes((tiny_model / name).read_bytes())
    words = [paragraph.split() for paragraph in paragraphs[:60]]
    pairs = [
        {"prompt": " ".join(w[:6]), "chosen": " ".join(w[6:14]), "rejected": " ".join(w[14:20])}
        for w in words
        if len(w) > 20
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    engine = {"dtype": "float32", "engine": "transformers"}
    body = {
        "name": "pairs",
        "models": {
            "teacher": {"path": str(tiny_model), **engine},
            "aligned": {"path": str(aligned), **engine},
        },
        "steps": {
            "pairs": {
                "stage": "preference_pairs",
                "source": {"kind": "jsonl", "paths": [str(path)]},
                "tokenizer": "teacher",
                "template": "plain",
                "max_prompt_length": 64,
                "max_response_length": 64,
                "heldout_fraction": 0.2,
                "rows_per_shard": 8,
            },
            "logprobs": {"stage": "response_logprobs", "input": "pairs", "model": "teacher"},
            "responses": {
                "stage": "responses",
                "input": "pairs",
                "model": "teacher",
                "max_tokens": 8,
            },
            "advantages": {
                "stage": "advantages",
                "input": "responses",
                "model": "aligned",
                "reference": "teacher",
                "beta": 0.5,
            },
        },
        "execution": _execution(tmp_path),
    }
    held_to_a_run(_written(tmp_path, body))


@pytest.mark.slow
def test_episodes_with_both_scores(tiny_model: Path, tmp_path: Path) -> None:
    for task, labels in (("mood", ("glad", "sad and blue")), ("kind", ("yes", "no", "maybe"))):
        write_task(tmp_path / "tasks", task, labels, 24)
    write_task(tmp_path / "tasks", "size", ("big", "small"), 20)
    body = {
        "name": "icl",
        "models": {
            "teacher": {"path": str(tiny_model), "dtype": "float32", "engine": "transformers"}
        },
        "steps": {
            "episodes": {
                "stage": "episodes",
                "tokenizer": "teacher",
                "sources": [
                    {
                        "kind": "crossfit",
                        "paths": [str(tmp_path / "tasks")],
                        "task_kind": "classification",
                    }
                ],
                "targets": ["size"],
                "paradigm": "meta",
                "demonstrations": {"min": 3, "max": 4},
                "draw": "partition",
                "draws": 2,
                "support": 8,
                "queries_per_task": 5,
                "max_length": 256,
                "rows_per_shard": 4,
            },
            "preferences": {"stage": "subset_preferences", "input": "episodes", "model": "teacher"},
            "candidates": {"stage": "candidate_scores", "input": "episodes", "model": "teacher"},
        },
        "execution": _execution(tmp_path),
    }
    held_to_a_run(_written(tmp_path, body))


def _execution(folder: Path) -> dict[str, Any]:
    return {
        "root": str(folder / "root"),
        "engine": {"device": "cpu", "num_threads": 1, "cache_dir": str(folder / "head_check")},
    }


def _written(folder: Path, body: dict[str, Any]) -> TinyRecipe:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return TinyRecipe(path, folder / "root")


@pytest.mark.slow
def test_what_is_finished_costs_nothing_and_stays_as_it_is(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:40])
    assert teachercache("run", recipe.path, "--step", "documents").code == 0
    before = stamps(recipe.root)
    documents, signals = estimated(recipe)["steps"]
    assert documents["seconds"] == documents["left_bytes"] == 0
    manifest = finished_manifest(recipe.step("documents"))
    assert manifest is not None and documents["num_rows"] == manifest.num_rows
    assert signals["num_rows"] == manifest.num_rows and signals["seconds"] > 0
    assert stamps(recipe.root) == before
    said = teachercache("plan", recipe.path, "--estimate")
    assert "to write: " in said.out and "memory a worker, signals: weights" in said.out


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "text", "parquet", "arrow"])
def test_halves_of_a_source_hold_whole_records_of_a_known_share(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_sample, "HALF_BYTES", 40_000)
    random = Random(0)
    texts = [random.randbytes(20 + number % 97).hex() for number in range(8000)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    source: Any = TableFiles(kind="jsonl", paths=(str(path),))
    if kind == "jsonl.gz":
        path = path.with_suffix(".jsonl.gz")
        path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
        source = TableFiles(kind="jsonl", paths=(str(path),))
    elif kind == "text":
        path = tmp_path / "a.txt"
        path.write_text("\n".join(texts) + "\n")
        source = TextFiles(kind="text", paths=(str(path),), sample_by="line")
    elif kind == "parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=100)
        source = TableFiles(kind="parquet", paths=(str(tmp_path / "a.parquet"),))
    elif kind == "arrow":
        table = pa.table({"text": texts})
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
        source = TableFiles(kind="arrow", paths=(str(tmp_path / "a.arrow"),))
    folder = tmp_path / "halves"
    folder.mkdir()
    sample = sample_of(source, folder)
    assert sample is not None
    found: list[list[str]] = []
    for half, share in zip(sample.sources, sample.shares, strict=True):
        (file,) = half.files()
        found.append(_texts(file, kind))
        assert found[-1] and set(found[-1]) <= set(texts)
        assert len(found[-1]) / share == pytest.approx(len(texts), rel=0.25)
    assert not set(found[0]) & set(found[1])


def _texts(file: Path, kind: str) -> list[str]:
    if kind == "parquet":
        return list(pq.read_table(file)["text"].to_pylist())
    if kind == "arrow":
        return list(pa.ipc.open_stream(file.read_bytes()).read_all()["text"].to_pylist())
    lines = file.read_text().splitlines()
    return lines if kind == "text" else [json.loads(line)["text"] for line in lines]


def test_a_small_source_and_one_array_are_read_whole(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    assert sample_of(TableFiles(kind="jsonl", paths=(str(path),)), tmp_path) is None
    assert sample_of(TableFiles(kind="json", paths=(str(path),)), tmp_path) is None


@pytest.mark.slow
def test_a_step_that_cannot_be_probed_is_named_and_left_out_of_the_sums(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    """Nothing is held out, so an evaluation has no rows: its run would say so, too."""
    results = {"stage": "evaluate", "students": ["teacher"], "data": ["documents", "signals"]}
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:30], more_steps={"results": results})
    edit_recipe(recipe, "steps", "documents", "heldout_fraction", value=0.0)
    found = estimated(recipe)
    assert found["unknown"] == ["results"]
    assert found["steps"][-1]["found_by"].startswith("not known: ")
