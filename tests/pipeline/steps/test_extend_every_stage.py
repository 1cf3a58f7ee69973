"""Each signal stage is extended by the command: what comes of it is what a run from nothing makes.

Sequences go through the engine one by one here, so that no last bit depends on which rows stand
together: what is promised of new rows within a tolerance is then equal to the bit.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.open_table import open_table
from schemas.storage.files import write_text
from schemas.storage.manifest import read_manifest
from stages.registry import STAGES
from stages.signals.teacher_logits.calibration import CALIBRATION, read_calibration
from stages.stage import SignalStage
from tests.conftest import save_tiny_model
from tests.fixtures.task_files import episodes_step, write_tasks
from tests.fixtures.tiny_recipe import (
    TinyRecipe,
    edit_recipe,
    make_recipe,
    table_bytes,
    teachercache,
    write_jsonl,
)
from tests.stages.sources.test_preference_pairs import CHATML

pytestmark = pytest.mark.slow
KNOWN, ALL = 110, 121  # documents of 48 tokens: a tau is found over the first 88 of them
ENCODINGS: dict[str, dict[str, Any]] = {
    "threshold_tau": {"kind": "threshold"},
    "threshold_packed": {"kind": "threshold", "layout": "packed"},
    "threshold_k": {"kind": "threshold", "k": 6},
    "mean_k": {"kind": "threshold", "mean_k": 40},
    "mean_k_packed": {"kind": "threshold", "mean_k": 40, "layout": "packed"},
    "top_k": {"kind": "top_k", "k": 6},
    "exact": {"kind": "exact"},
}
SUPPORTS: dict[str, dict[str, Any]] = {
    "threshold_tau": {"kind": "threshold"},
    "threshold_k": {"kind": "threshold", "k": 6},
    "union_top_k": {"kind": "union_top_k", "k": 4},
    "as_released": {"kind": "as_released", "k": 6},
    "exact": {"kind": "exact"},
}


def steps(folder: Path) -> dict[str, Any]:
    """Every signal stage on every table that it reads, and in every form that it writes."""

    def teacher(stage: str, input_: str, **more: Any) -> dict[str, Any]:
        return {"stage": stage, "input": input_, "model": "teacher", **more}

    advantages = teacher("advantages", "responses", reference="student", beta=0.5)
    return {
        "pairs": {
            "stage": "preference_pairs",
            "tokenizer": "teacher",
            "source": {
                "kind": "jsonl",
                "paths": [str(folder / "pairs.jsonl")],
                "format": "sharegpt",
            },
            "max_prompt_length": 64,
            "max_response_length": 48,
            "heldout_fraction": 0.2,
            "rows_per_shard": 6,
        },
        "episodes": episodes_step(folder),
        "shown": {"stage": "demonstrations", "input": "episodes"},
        **{
            f"documents_{name}": teacher("teacher_logits", "documents", encoding=encoding)
            for name, encoding in ENCODINGS.items()
        },
        "pair_signals": teacher("teacher_logits", "pairs"),
        "episode_signals": teacher("teacher_logits", "episodes"),
        "shown_signals": teacher("teacher_logits", "shown"),
        "pair_logprobs": teacher("response_logprobs", "pairs"),
        "responses": teacher("responses", "pairs", max_tokens=8, temperature=1.0, n=2),
        "logprobs_of_responses": teacher("response_logprobs", "responses"),
        "answered": {"stage": "answers", "input": "responses", "finish_reasons": ["length"]},
        "answer_signals": teacher("teacher_logits", "answered"),
        **{
            f"advantages_{name}": advantages
            | {"support": support, "beta": 1.0 if name == "as_released" else 0.5}
            for name, support in SUPPORTS.items()
        },
        "entropies": teacher("token_entropies", "documents"),
        "answer_entropies": teacher("token_entropies", "answered"),
        "candidates": teacher("candidate_scores", "episodes"),
        "subsets": teacher("subset_preferences", "episodes"),
        "similar_subsets": teacher(
            "subset_preferences", "episodes", sampler={"kind": "similarity", "encoder": "encoder"}
        ),
    }


SIGNALS = [
    *(f"documents_{name}" for name in ENCODINGS),
    *("pair_signals", "episode_signals", "shown_signals", "answer_signals", "pair_logprobs"),
    *("responses", "logprobs_of_responses", *(f"advantages_{name}" for name in SUPPORTS)),
    *("candidates", "subsets", "similar_subsets", "entropies", "answer_entropies"),
]


@dataclass(frozen=True)
class Grown:
    """A recipe whose inputs have grown: extended, and run from nothing beside it, with equal taus.

    ``earlier`` are the folders of the tables that it had on the smaller inputs, by step.
    """

    extended: TinyRecipe
    full: TinyRecipe
    earlier: Mapping[str, Path]
    said: str


@pytest.fixture(scope="module")
def grown(
    paragraphs: list[str], tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Grown:
    folder = tmp_path_factory.mktemp("grown")
    model = save_models(folder)
    recipe = make_recipe(folder, model, paragraphs[:KNOWN], more_steps=steps(folder))
    body = yaml.safe_load(recipe.path.read_text())
    del body["steps"]["signals"]
    body["steps"]["documents"] |= {
        "mode": "truncate",
        "rows_per_shard": 25,
    }
    body["models"]["student"] = {**body["models"]["teacher"], "path": str(folder / "student")}
    body["models"]["encoder"] = {**body["models"]["teacher"], "path": str(tiny_encoder)}
    body["execution"]["engine"] |= {"head_check": "off", "max_num_batched_tokens": 1}
    recipe.path.write_text(yaml.safe_dump(body, sort_keys=False))
    words = [paragraph.split() for paragraph in paragraphs[60:86]]
    write_pairs(folder, words[:20])
    write_tasks(folder, words, "mood", "size")
    recipe.run()
    earlier = {step.name: step.folder for step in recipe.plan()}

    write_jsonl(folder / "a.jsonl", paragraphs[:ALL])
    write_pairs(folder, [*words[20:], *words[1:20]])  # and one is no longer there
    write_tasks(folder, words, "mood", "size", "tone")
    (folder / "full").mkdir()
    full = TinyRecipe(folder / "full.yaml", folder / "full")
    shutil.copy(recipe.path, full.path)
    edit_recipe(full, "execution", "root", value=str(full.root))
    for step in full.plan():  # of other first rows: an extension keeps the tau that there was
        tau = earlier[step.name] / CALIBRATION
        if tau.is_file():
            write_text(step.folder / CALIBRATION, tau.read_text())
    full.run()
    said = teachercache("extend", recipe.path)
    assert said.code == 0, said.err
    return Grown(recipe, full, earlier, said.out)


def save_models(folder: Path) -> Path:
    """Save a teacher, and a student that is a little apart from it."""
    model = save_tiny_model(folder / "model", vocab_size=512)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHATML
    student: Any = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.02 * torch.randn_like(weight)
    student.save_pretrained(folder / "student")
    for place in (model, folder / "student"):
        tokenizer.save_pretrained(place)
    return model


def write_pairs(folder: Path, words: list[list[str]]) -> None:
    pairs = [
        {
            "conversations": [{"from": "human", "value": " ".join(text[:6]) + "?"}],
            "chosen": {"from": "gpt", "value": " ".join(text[6:10]) + "."},
            "rejected": {"from": "gpt", "value": " ".join(text[10:16]) + "."},
        }
        for text in words
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def extended_from(folder: Path) -> dict[str, int]:
    """What the records say of where rows were copied from; empty: they were made."""
    notes = [json.loads(path.read_text())["notes"] for path in folder.glob("shard-*.json")]
    found = [note.get("extended_from", {}) for note in notes]
    assert found and all(one == found[0] for one in found)
    return dict(found[0])


def test_every_signal_stage_is_here(grown: Grown) -> None:
    signals = {type(s.stage): s.name for s in grown.full.plan() if isinstance(s.stage, SignalStage)}
    assert signals.keys() == {stage for stage in STAGES if issubclass(stage, SignalStage)}
    named = {step.name for step in grown.full.plan() if isinstance(step.stage, SignalStage)}
    assert named == set(SIGNALS)


@pytest.mark.parametrize("step", SIGNALS)
def test_the_bytes_are_those_of_a_run_from_nothing(grown: Grown, step: str) -> None:
    ours, theirs = (recipe.step(step).folder for recipe in (grown.extended, grown.full))
    assert extended_from(theirs) == {}
    (copied,) = extended_from(ours).items()
    earlier = read_manifest(grown.earlier[step])
    assert copied[0] == earlier.fingerprint
    num_rows = read_manifest(ours).num_rows
    kept = {*_keys(grown.earlier[step])} & {*_keys(ours)}
    assert copied[1] == len(kept) and num_rows / 2 < len(kept) < num_rows
    found, expected = table_bytes(ours), table_bytes(theirs)
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name
    assert f"[{step}] {num_rows - len(kept)} of {num_rows} rows are new" in grown.said


def _keys(folder: Path) -> list[bytes]:
    return list(open_table(folder, split=None, verify=False).sample_ids().tolist())


def test_verify_and_audit_pass(grown: Grown) -> None:
    for step in SIGNALS:
        folder = grown.extended.step(step).folder
        said = teachercache("verify", folder)
        assert said.code == 0, said.out + said.err
    audited = [step for step in SIGNALS if step != "responses"]
    words = [word for step in audited for word in ("--step", step)]
    said = teachercache("audit", grown.extended.path, "--engine", "transformers", *words)
    assert said.code == 0, said.out + said.err
    assert said.out.count(": faithful, ") == len(audited)


def test_the_earlier_tables_may_go(grown: Grown, tmp_path: Path) -> None:
    recipe = grown.extended.copy(tmp_path)
    said = teachercache("gc", recipe.root, "--keep", recipe.path, "--delete")
    assert said.code == 0, said.err
    for step, earlier in grown.earlier.items():
        folder = recipe.step(step).folder
        assert not (recipe.root / earlier.relative_to(grown.extended.root)).exists()
        assert table_bytes(folder) == table_bytes(grown.extended.step(step).folder)
        assert teachercache("verify", folder).code == 0
    assert teachercache("repair", recipe.path).code == 0
    assert set(recipe.run().states.values()) == {"done"}


def test_other_responses_to_the_same_prompts_are_scored_anew(grown: Grown, tmp_path: Path) -> None:
    """Their rows have the pairs' ids, so the ids alone would not tell."""
    recipe = grown.extended.copy(tmp_path)
    edit_recipe(recipe, "steps", "responses", "seed", value=1)
    only = recipe.only("pairs", "responses", "advantages_threshold_tau")
    said = teachercache("extend", only.path)
    assert said.code == 0, said.err
    folder = recipe.step("advantages_threshold_tau").folder
    earlier = grown.extended.step("advantages_threshold_tau").folder
    assert {*_keys(folder)} == {*_keys(earlier)}
    assert folder.name != earlier.name and extended_from(folder) == {}
    assert "[advantages_threshold_tau] no finished table has a row of it" in said.out
    for name, content in table_bytes(earlier).items():
        assert not name.endswith(".arrow") or content != (folder / name).read_bytes()


def test_of_other_first_rows_the_tau_is_kept_and_this_is_said(
    grown: Grown, paragraphs: list[str], tmp_path: Path
) -> None:
    """A run from nothing would find another tau, of which no row could be copied."""
    recipe = grown.full.copy(tmp_path).only("documents", "documents_mean_k")
    path = write_jsonl(tmp_path / "b.jsonl", [*paragraphs[300:340], *paragraphs[:KNOWN]])
    edit_recipe(recipe, "steps", "documents", "source", "paths", value=[str(path)])
    full = TinyRecipe(tmp_path / "alone.yaml", tmp_path / "alone")
    shutil.copy(recipe.path, full.path)
    edit_recipe(full, "execution", "root", value=str(full.root))
    full.run()
    said = teachercache("extend", recipe.path)
    assert said.code == 0, said.err
    ours, theirs = (each.step("documents_mean_k").folder for each in (recipe, full))
    tau, anew = read_calibration(ours), read_calibration(theirs)
    assert tau is not None and anew is not None and tau.tau != anew.tau
    assert tau == read_calibration(grown.full.step("documents_mean_k").folder)
    assert f"the rows keep their tau, which is not found anew: {tau}" in said.out
    assert teachercache("verify", ours).code == 0
    audit = teachercache("audit", recipe.path, "--engine", "transformers")
    assert audit.code == 0, audit.out
