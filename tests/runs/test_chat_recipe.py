"""Conversations as a recipe on a tiny chat model: rows, the teacher over them, students of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.dataset import CachedDataset, open_dataset
from schemas.scored_spans import span_targets
from schemas.storage.manifest import read_manifest
from stages.models.checkpoints.checkpoint import read_checkpoint
from tests.conftest import save_tiny_model
from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe, stamps, teachercache
from tests.stages.sources.test_conversations import said
from tests.stages.sources.test_preference_pairs import CHATML

TRAIN = {"stage": "train", "student": "small", "max_steps": 2, "lr": 1e-3}
BOTH = ["chats", "chat_signals"]
STEPS: dict[str, Any] = {
    "chat_signals": {
        "stage": "teacher_logits",
        "input": "chats",
        "model": "teacher",
        "encoding": {"kind": "exact"},
    },
    "sparse_signals": {"stage": "teacher_logits", "input": "chats", "model": "teacher"},
    "small": {"stage": "student_init", "model": "teacher", "layers": [0]},
    "kd": {**TRAIN, "data": BOTH, "objective": {"loss": "kd"}},
    "sparse_kd": {**TRAIN, "data": ["chats", "sparse_signals"], "objective": {"loss": "kd"}},
    "sft": {**TRAIN, "data": ["chats"], "objective": {"loss": "sft"}},
    "plain": {**TRAIN, "data": BOTH, "objective": {"loss": "cross_entropy"}},
    "said": {
        "stage": "responses",
        "input": "chats",
        "model": "teacher",
        "max_tokens": 6,
        "temperature": 1.0,
        "n": 2,
    },
    "answered": {"stage": "answers", "input": "said", "finish_reasons": ["stop", "length"]},
    "answer_signals": {"stage": "teacher_logits", "input": "answered", "model": "teacher"},
    "seq_kd": {**TRAIN, "data": ["answered", "answer_signals"], "objective": {"loss": "kd"}},
    "results": {"stage": "evaluate", "students": ["small", "kd", "sft"], "data": BOTH},
}


@pytest.fixture(scope="module")
def recipe(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> TinyRecipe:
    folder = tmp_path_factory.mktemp("chat")
    model = save_tiny_model(folder / "model", vocab_size=640)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens(
        {
            "eos_token": "<|im_end|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        }
    )
    tokenizer.chat_template = CHATML
    save_tiny_model(model, vocab_size=len(tokenizer))  # no row of the head without a token
    tokenizer.save_pretrained(model)
    words = [paragraph.split() for paragraph in paragraphs[:40]]
    chats = [
        said(*(" ".join(text[start : start + 4]) for start in (0, 4, 8, 12)), system="Be kind.")
        for text in words
        if len(text) >= 16
    ]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    source = {"kind": "jsonl", "paths": [str(path)]}
    rows: dict[str, Any] = {
        "stage": "conversations",
        "source": source,
        "tokenizer": "teacher",
        "max_length": 160,
        "heldout_fraction": 0.3,
        "rows_per_shard": 8,
    }
    made = make_recipe(folder, model, paragraphs[:2], more_steps={"chats": rows, **STEPS})
    return made.only("chats", *STEPS)


@pytest.fixture(scope="module")
def ran(recipe: TinyRecipe) -> TinyRecipe:
    done = teachercache("run", recipe.path)
    assert done.code == 0, done.err
    return recipe


def tables_of(recipe: TinyRecipe, *names: str, split: str | None = None) -> CachedDataset:
    return open_dataset([recipe.step(name).folder for name in names], split=split)


def live_numbers(folder: Path, teacher: Path, data: CachedDataset) -> tuple[float, float]:
    """Mean cross-entropy and KL to the teacher at the spans, by float64 forwards of whole rows."""
    student, live = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64).eval()
        for place in (folder, teacher)
    )
    entropies, divergences = [], []
    for index in range(len(data)):
        row = data[index]
        ids_T = torch.from_numpy(np.asarray(row["input_ids_T"], np.int64))
        targets_P = torch.from_numpy(span_targets(row["scored_S2"]))
        with torch.no_grad():
            mine_PV, its_PV = (
                model(input_ids=ids_T[None]).logits[0, targets_P - 1].log_softmax(-1)
                for model in (student, live)
            )
        entropies.append(-mine_PV.gather(1, ids_T[targets_P][:, None])[:, 0])
        divergences.append((its_PV.exp() * (its_PV - mine_PV)).sum(-1))
    return float(torch.cat(entropies).mean()), float(torch.cat(divergences).mean())


@pytest.mark.slow
def test_the_teacher_is_asked_at_the_answers_alone(ran: TinyRecipe) -> None:
    chats = tables_of(ran, *BOTH)
    assert chats.num_missing == 0
    manifest = read_manifest(ran.step("chat_signals").folder)
    scored = sum(len(span_targets(chats[index]["scored_S2"])) for index in range(len(chats)))
    assert (
        manifest.num_positions
        == scored
        < 0.6 * sum(len(chats[index]["input_ids_T"]) for index in range(len(chats)))
    )
    assert teachercache("verify", ran.root).code == 0
    before = stamps(ran.root)
    assert teachercache("run", ran.path).code == 0
    assert stamps(ran.root) == before


@pytest.mark.slow
def test_students_are_measured_at_the_answers(ran: TinyRecipe) -> None:
    """Each number against plain forward passes; sft is the cross-entropy of the same tokens."""
    held_out = tables_of(ran, *BOTH, split="heldout")
    teacher = Path(str(ran.step("chat_signals").models["teacher"].base))
    measured = json.loads((ran.step("results").folder / "evaluation.json").read_text())
    for name in ("small", "kd", "sft"):
        found = measured[name]
        cross_entropy, kl = live_numbers(Path(str(ran.step(name).folder)), teacher, held_out)
        assert found["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-4)
        assert found["kl_to_teacher"] == pytest.approx(kl, rel=5e-3, abs=1e-4)  # float16 states
    losses = {}
    for name in ("kd", "sparse_kd", "sft", "plain"):
        record = read_checkpoint(ran.step(name).folder)
        assert record is not None
        losses[name] = record.metrics
    assert losses["sft"]["after"]["cross_entropy"] == losses["plain"]["after"]["cross_entropy"]
    assert losses["kd"]["after"]["kl_to_teacher"] < losses["kd"]["before"]["kl_to_teacher"]
    sparse = losses["sparse_kd"]
    assert sparse["after"]["cross_entropy"] != sparse["before"]["cross_entropy"]


@pytest.mark.slow
def test_the_teachers_own_answers_are_conversations(ran: TinyRecipe) -> None:
    """Each after its prompt, on the prompt's side, under a key of its own; students learn them."""
    chats, said_by = tables_of(ran, "chats"), tables_of(ran, "said")
    answered = tables_of(ran, "answered", "answer_signals")
    prompts = {chats[index]["sample_id"]: chats[index] for index in range(len(chats))}
    responses = {said_by[index]["sample_id"]: said_by[index] for index in range(len(said_by))}
    assert answered.num_missing == 0 and len(answered) >= len(prompts)
    for index in range(len(answered)):
        row = answered[index]
        prompt, said_row = prompts[row["source_id"]], responses[row["source_id"]]
        ((start, end),) = row["scored_S2"].tolist()
        assert start == prompt["scored_S2"][-1][0] and row["split"] == prompt["split"]
        np.testing.assert_array_equal(row["input_ids_T"][:start], prompt["input_ids_T"][:start])
        first, second = np.split(said_row["response_ids_A"], said_row["response_lengths_N"][:1])
        found = row["input_ids_T"][start:end].tolist()
        assert found in (first.tolist(), second.tolist())
        assert len(row["next_token_logprobs_P"]) == end - start
    trained = read_checkpoint(ran.step("seq_kd").folder)
    assert trained is not None and trained.metrics["after"]["tokens"] > 0


@pytest.mark.slow
def test_a_users_scores_choose_the_answers(ran: TinyRecipe, tmp_path: Path) -> None:
    """As docs/guides/conversations.md does it: a script over the responses, then the step."""
    said_by = open_dataset([ran.step("said").folder])
    best = {}
    with (tmp_path / "scores.jsonl").open("w") as out:
        for index in range(len(said_by)):
            row = said_by[index]
            ends = np.cumsum(row["response_lengths_N"])[:-1]
            answers = np.split(row["response_ids_A"], ends)
            for number, ids_A in enumerate(answers):
                line = {"sample_id": row["sample_id"], "response": number, "score": int(ids_A[0])}
                out.write(json.dumps(line) + "\n")
            best[row["sample_id"]] = max(answers, key=lambda ids_A: int(ids_A[0]))
    body = yaml.safe_load(ran.path.read_text())
    chosen = body["steps"]["answered"] | {
        "scores": {"kind": "jsonl", "paths": [str(tmp_path / "scores.jsonl")]},
        "keep": "best",
    }
    body["steps"] = {name: body["steps"][name] for name in ("chats", "said")} | {"best": chosen}
    recipe = TinyRecipe(tmp_path / "recipe.yaml", ran.root)
    recipe.path.write_text(yaml.safe_dump(body, sort_keys=False))
    assert recipe.run().finished == ["best"]
    found = tables_of(recipe, "best")
    assert len(found) == len(best)
    for index in range(len(found)):
        row = found[index]
        start = int(row["scored_S2"][0, 0])
        assert row["input_ids_T"][start] == best[row["source_id"]][0]
