"""No alarm on sound tables, by whatever engine; what is refused, and what the command says."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.audit.audit import AuditOptions, audit_table
from pipeline.audit.audited import tables_of_recipe
from pipeline.state.audit_verdict import verdict_of
from schemas.storage.manifest import read_manifest, write_manifest
from stages.registry import STAGES, name_of
from stages.stage import SignalStage
from tests.conftest import save_tiny_model
from tests.fixtures.tiny_recipe import TinyRecipe, edit_recipe, make_recipe, teachercache
from tests.fixtures.wrong_signals import captured, rewrite

OFF = "execution.engine.head_check=off"
MORE = {
    "by_tau": {"stage": "teacher_logits", "input": "documents", "model": "teacher"},
    "packed": {
        "stage": "teacher_logits",
        "input": "documents",
        "model": "teacher",
        "encoding": {"kind": "threshold", "mean_k": 6, "layout": "packed"},
    },
}


@pytest.fixture(scope="module")
def made(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    folder = tmp_path_factory.mktemp("sound")
    recipe = make_recipe(folder, tiny_model, paragraphs[:6], more_steps=MORE)
    recipe.run(OFF)
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("step", ["signals", *MORE])
def test_no_alarm_of_any_seed(
    made: TinyRecipe, step: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The teacher that made the table had other last bits in every weight, as of another engine."""
    recipe = made.copy(tmp_path)
    other = save_tiny_model(tmp_path / "other", vocab_size=512)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1 + 1e-6 * torch.randn_like(weight)
    model.save_pretrained(other)
    planned = recipe.step(step)
    out = planned.folder if step == "packed" else tmp_path
    rewrite(planned.folder, lambda _: captured(planned, {"teacher": other}, out=out))
    (table,) = tables_of_recipe(recipe.path, [OFF], [step])
    for seed in range(25):
        found = audit_table(table, AuditOptions(20, seed, "transformers"), lambda line: None)
        assert found.outcome == "faithful", found.failures


def test_a_verdict_and_what_is_said(made: TinyRecipe, tmp_path: Path) -> None:
    """All signal tables of a recipe, for people and as JSON; the verdict is beside the table."""
    recipe = made.copy(tmp_path)
    (recipe.step("by_tau").folder / "manifest.json").unlink()  # what is not finished is left out
    words = ("audit", recipe.path, "--engine", "transformers", "--set", OFF)
    said = teachercache(*words)
    assert said.code == 0 and said.out.count(": faithful, ") == 2, said.out
    for text in ("finds a fault in", "of the capture", "truncation, of the encoding", "allowed"):
        assert said.out.count(text) == 2
    more = ("--json", "--rows", "5", "--seed", "3", "--step", "signals")
    found = json.loads(teachercache(*words, *more).out)
    assert list(found) == ["signals"]
    folder = recipe.step("signals").folder
    verdict = verdict_of(folder, read_manifest(folder).dataset_id)
    assert verdict is not None and verdict.num_rows == 5 and verdict.settings["seed"] == 3
    assert found["signals"]["measures"] == verdict.measures
    assert 0 < verdict.settings["cost"] < 1
    # Two rows of 48 tokens to the end, three as far as three positions; all once more as control.
    assert verdict.settings["tokens_read"] == 2 * (2 * 48 + 3 * 4)


def test_a_folder_alone_with_its_model(made: TinyRecipe, tiny_model: Path, tmp_path: Path) -> None:
    """The input is found beside it; another model is refused in a line that says what differs."""
    recipe = made.copy(tmp_path)
    words = ("--engine", "transformers", "--rows", "4")
    for step in ("signals", "packed"):
        said = teachercache("audit", recipe.step(step).folder, "--model", tiny_model, *words)
        assert said.code == 0, said.err + said.out
    folder = recipe.step("signals").folder
    other = save_tiny_model(tmp_path / "other", vocab_size=512, tie=False)
    said = teachercache("audit", folder, "--model", other, *words)
    assert said.code == 2 and "is not the model that made" in said.error
    assert "config, weights differ" in said.error
    said = teachercache("audit", folder, *words)
    assert said.code == 2 and "made by 1 models (model) and 0 are given" in said.error
    said = teachercache("audit", recipe.step("documents").folder, "--model", tiny_model)
    assert said.code == 2 and "no model made row by row" in said.error
    manifest = read_manifest(folder)
    body = {**manifest.identity, "version": 1}
    write_manifest(folder, replace(manifest, identity=body))
    said = teachercache("audit", folder, "--model", tiny_model)
    assert said.code == 2 and "was made by version 1 of stage teacher_logits" in said.error


def test_what_is_not_there_is_one_line(made: TinyRecipe, tmp_path: Path) -> None:
    said = teachercache("audit", made.path, "--step", "nowhere")
    assert said.code == 2 and "'nowhere' is no step" in said.error
    said = teachercache("audit", made.path, "--step", "documents")
    assert said.code == 2 and "no finished signal table" in said.error
    said = teachercache("audit", made.path, "--engine", "jax")
    assert said.code == 2 and "expected vllm or transformers" in said.error
    said = teachercache("audit", tmp_path / "nothing")
    assert said.code == 1 and "does not exist" in said.error


def test_every_signal_stage_says_what_an_audit_asks() -> None:
    """But for responses, which are drawn by an engine's own sampler."""
    signals = [stage for stage in STAGES if issubclass(stage, SignalStage)]
    without = [
        name_of(s) for s in signals if find_spec(s.__module__[: -len("stage")] + "audit") is None
    ]
    assert without == ["responses"] and len(signals) == 7


@pytest.mark.slow
def test_a_table_in_bfloat16_allows_more(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:6])
    edit_recipe(recipe, "models", "teacher", "dtype", value="bfloat16")
    recipe.run(OFF)
    said = teachercache("audit", recipe.path, "--engine", "transformers")
    assert said.code == 0, said.out
    folder = recipe.step("signals").folder
    verdict = verdict_of(folder, read_manifest(folder).dataset_id)
    assert verdict is not None and verdict.settings["dtype"] == "bfloat16"
    assert all(m["allowed"] >= m["floor"] >= 1e-2 for m in verdict.measures.values())


@pytest.mark.vllm
def test_a_table_of_vllm_and_a_live_teacher_in_transformers(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    """By default the other engine is live, and the one that made the table is its control."""
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:12])
    edit_recipe(recipe, "models", "teacher", "engine", value="vllm")
    edit_recipe(recipe, "execution", "engine", "kv_cache_memory_bytes", value=64 << 20)
    recipe.run(OFF)
    said = teachercache("audit", recipe.path, "--set", OFF)
    assert said.code == 0, said.out + said.err
    folder = recipe.step("signals").folder
    verdict = verdict_of(folder, read_manifest(folder).dataset_id)
    assert verdict is not None and verdict.engine == "transformers"
    controls = verdict.measures["entropies_P"]["control"]
    assert set(controls) == {"another batch", "the other engine"}
    assert 0 < controls["the other engine"] < 1e-3
    assert verdict.measures["entropies_P"]["allowed"] < 2e-3
