"""Every kind of signal table is audited: sound ones are faithful, one changed number is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.audit.sample import FEWEST
from pipeline.state.audit_verdict import AuditVerdict, verdict_of
from schemas.storage.manifest import read_manifest
from tests.conftest import save_tiny_model
from tests.fixtures.changed_entries import CHANGES, places_of
from tests.fixtures.task_files import episodes_step, write_tasks
from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe, teachercache
from tests.fixtures.tiny_t5 import save_t5
from tests.fixtures.wrong_signals import at_rows, rewrite, stored_rows
from tests.stages.sources.test_preference_pairs import CHATML

EXACT, TOP_K = {"kind": "exact"}, {"kind": "top_k", "k": 6}
SUPPORTS: dict[str, dict[str, Any]] = {
    "threshold_tau": {"kind": "threshold"},
    "threshold": {"kind": "threshold", "k": 6},
    "union_top_k": {"kind": "union_top_k", "k": 4},
    "as_released": {"kind": "as_released", "k": 6},
    "exact": {"kind": "exact"},
}


def _logits(input_: str, **more: Any) -> dict[str, Any]:
    return {"stage": "teacher_logits", "input": input_, "model": "teacher", **more}


def steps(folder: Path) -> dict[str, Any]:
    advantages = {"stage": "advantages", "model": "aligned", "reference": "teacher"}
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
        "pair_signals": _logits("pairs", encoding={"kind": "threshold", "k": 6}),
        "pair_logprobs": {"stage": "response_logprobs", "input": "pairs", "model": "teacher"},
        "responses": {
            "stage": "responses",
            "input": "pairs",
            "model": "teacher",
            "max_tokens": 8,
            "temperature": 1.0,
            "n": 2,
        },
        "token_logprobs": {
            "stage": "response_logprobs",
            "input": "responses",
            "model": "aligned",
            "per_token": True,
        },
        "answered": {
            "stage": "answers",
            "input": "responses",
            "finish_reasons": ["stop", "length"],
        },
        "answer_signals": _logits("answered", encoding=TOP_K),
        **{
            f"entropies_of_{name}": {"stage": "token_entropies", "input": name, "model": "aligned"}
            for name in ("documents", "answered")
        },
        **{
            f"advantages_{name}": {
                **advantages,
                "input": "responses",
                "beta": 1.0 if name == "as_released" else 0.5,
                "support": support,
            }
            for name, support in SUPPORTS.items()
        },
        "episodes": episodes_step(folder),
        "episode_signals": _logits("episodes"),
        "candidates": {"stage": "candidate_scores", "input": "episodes", "model": "teacher"},
        "preferences": {"stage": "subset_preferences", "input": "episodes", "model": "teacher"},
        "shown": {"stage": "demonstrations", "input": "episodes"},
        "shown_signals": _logits("shown", encoding=EXACT),
    }


TABLES = [
    *("pair_signals", "pair_logprobs", "token_logprobs", "answer_signals", "episode_signals"),
    *("candidates", "preferences", "shown_signals", "entropies_of_documents"),
    "entropies_of_answered",
    *(f"advantages_{name}" for name in SUPPORTS),
]


@pytest.fixture(scope="module")
def made(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> TinyRecipe:
    """One recipe with a table of each kind, run."""
    folder = tmp_path_factory.mktemp("every_table")
    model = save_tiny_model(folder / "model", vocab_size=512)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    save_tiny_model(folder / "aligned", vocab_size=512)
    aligned: Any = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in aligned.parameters():
            weight += 0.02 * torch.randn_like(weight)
    aligned.save_pretrained(folder / "aligned")
    tokenizer.save_pretrained(folder / "aligned")
    words = [paragraph.split() for paragraph in paragraphs[60:80]]
    pairs = [
        {
            "conversations": [{"from": "human", "value": " ".join(text[:5]) + f" {number}?"}],
            "chosen": {"from": "gpt", "value": " ".join(text[5:9]) + "."},
            "rejected": {"from": "gpt", "value": " ".join(text[9:16]) + "."},
        }
        for number, text in enumerate(words)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    write_tasks(folder, words, "mood", "size")
    recipe = make_recipe(folder, model, paragraphs[:3], more_steps=steps(folder))
    body = yaml.safe_load(recipe.path.read_text())
    body["models"]["aligned"] = {**body["models"]["teacher"], "path": str(folder / "aligned")}
    recipe.path.write_text(yaml.safe_dump(body, sort_keys=False))
    recipe.run("execution.engine.head_check=off")
    return recipe


def audited(recipe: TinyRecipe, step: str, *more: str) -> tuple[int, AuditVerdict]:
    words = ("--step", step, "--engine", "transformers", *more)
    said = teachercache("audit", recipe.path, *words, "--set", "execution.engine.head_check=off")
    folder = recipe.step(step).folder
    found = verdict_of(folder, read_manifest(folder).dataset_id)
    assert found is not None, said.err
    return said.code, found


@pytest.mark.slow
@pytest.mark.parametrize("step", TABLES)
def test_a_sound_table_is_faithful_and_one_changed_number_is_not(
    made: TinyRecipe, step: str, tmp_path: Path
) -> None:
    recipe = made.copy(tmp_path)
    code, found = audited(recipe, step)
    assert (code, found.outcome) == (0, "faithful"), found.failures
    assert all(m["most"] <= m["allowed"] for m in found.measures.values())
    assert all(m["compared"] and m["control"] for m in found.measures.values())
    folder = recipe.step(step).folder
    manifest = read_manifest(folder)
    before = stored_rows(folder)
    # Rows of causal models are read as far as three positions of each response: one of these.
    row = next(at for at, row in enumerate(before[1]) if places_of(row)[0] < FEWEST)
    for change in CHANGES[manifest.table, manifest.variant].values():
        rewrite(folder, _changed(before, row, change))
        code, found = audited(recipe, step)
        assert (code, found.outcome) == (1, "unfaithful")
        assert [line.split()[0] for line in found.failures] == [before[1][row].sample_id]


def _changed(before: Any, at: int, change: Callable[[Any, int], Any]) -> Callable[[Any], Any]:
    def at_first_place(row: Any) -> Any:
        return change(row, places_of(row)[0])

    return lambda _: at_rows(before, at_first_place, [(1, at)])


@pytest.mark.slow
def test_an_encoder_decoder(paragraphs: list[str], tmp_path: Path) -> None:
    """MEND's teacher pass by a T5, which reads rows whole, in the one engine that runs it."""
    t5 = save_t5(tmp_path / "model", "newer")
    shown = {
        "shown": {"stage": "demonstrations", "input": "documents"},
        "shown_signals": _logits("shown"),
    }
    recipe = make_recipe(tmp_path, t5, paragraphs[:12], more_steps=shown)
    recipe = recipe.only("documents", "shown", "shown_signals")
    recipe.run()
    said = teachercache("audit", recipe.path)  # the default engine is the only one
    assert said.code == 0, said.out + said.err
    folder = recipe.step("shown_signals").folder

    def other(row: Any) -> Any:
        return replace(row, entropies_P=row.entropies_P * np.float16(0.9))

    rewrite(folder, lambda shards: at_rows(shards, other, [(0, 0)]))
    assert audited(recipe, "shown_signals")[0] == 1
