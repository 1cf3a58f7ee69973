"""On-policy distillation as a recipe of two rounds on a tiny chat model, by the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.dataset import CachedDataset, open_dataset
from stages.models.checkpoints.checkpoint import read_checkpoint
from tests.conftest import save_tiny_model
from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe, stamps, teachercache
from tests.stages.sources.test_conversations import said
from tests.stages.sources.test_preference_pairs import CHATML

ROUND = ("own", "scored", "student")
STEPS: dict[str, Any] = {
    "small": {"stage": "student_init", "model": "teacher", "layers": [0]},
    "own": {
        "stage": "responses",
        "input": "chats",
        "model": "writer",
        "max_tokens": 6,
        "temperature": 1.0,
        "n": 2,
        "max_rejected_fraction": 0.5,
    },
    "scored": {
        "stage": "response_logprobs",
        "input": "own",
        "model": "teacher",
        "per_token": True,
    },
    "student": {
        "stage": "train",
        "student": "small",
        "data": ["own", "scored"],
        "objective": {"loss": "opd"},
        "max_steps": 3,
        "per_device_batch_size": 4,
        "lr": 1e-3,
        "rounds": 2,
    },
    "results": {"stage": "evaluate", "students": ["small", "student"], "data": ["own", "scored"]},
}


@pytest.fixture(scope="module")
def ran(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> TinyRecipe:
    folder = tmp_path_factory.mktemp("opd")
    model = save_tiny_model(folder / "model", vocab_size=640)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    turns = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", **turns})
    tokenizer.chat_template = CHATML
    save_tiny_model(model, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(model)
    words = [paragraph.split() for paragraph in paragraphs[:24]]
    chats = [
        said(*(" ".join(text[start : start + 4]) for start in (0, 4)))
        for text in words
        if len(text) >= 8
    ]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    rows = {
        "stage": "conversations",
        "source": {"kind": "jsonl", "paths": [str(path)]},
        "tokenizer": "teacher",
        "max_length": 160,
        "heldout_fraction": 0.3,
        "rows_per_shard": 8,
    }
    made = make_recipe(folder, model, paragraphs[:2], more_steps={"chats": rows, **STEPS})
    text = made.path.read_text().replace(
        "models:\n", "models:\n  writer: {step: small, dtype: float32, engine: transformers}\n"
    )
    made.path.write_text(text)
    recipe = made.only("chats", *STEPS)
    done = teachercache("run", recipe.path)
    assert done.code == 0, done.err
    return recipe


def responses_of(recipe: TinyRecipe, number: str) -> CachedDataset:
    return open_dataset([recipe.step(f"{name}{number}").folder for name in ("own", "scored")])


@torch.no_grad()
def live_logprobs(folder: str, row: Any) -> np.ndarray:
    """[A] of the tokens of all responses of a row, by float64 forwards of whole sequences."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    prompt, parts = row["prompt_ids_T"], []
    for response in np.split(row["response_ids_A"], np.cumsum(row["response_lengths_N"])[:-1]):
        ids_T = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        logits_AV = model(input_ids=ids_T[None]).logits[0, len(prompt) - 1 : -1]
        picked = logits_AV.log_softmax(-1).gather(1, ids_T[len(prompt) :, None])
        parts.append(picked[:, 0].numpy())
    return np.concatenate(parts)


@pytest.mark.slow
def test_each_round_is_written_by_the_student_of_the_one_before(ran: TinyRecipe) -> None:
    """What both models say of each token is what plain forwards of their folders say."""
    teacher = ran.load().models["teacher"].path
    assert teacher is not None
    for number, writer in (("-r1", "small"), ("", "student-r1")):
        data = responses_of(ran, number)
        assert data.num_missing == 0
        for row in (data[0], data[len(data) - 1]):
            own_A = live_logprobs(str(ran.step(writer).folder), row)
            np.testing.assert_allclose(row["logprobs_A"], own_A, atol=1e-4)
            np.testing.assert_allclose(
                row["token_logprobs_A"], live_logprobs(teacher, row), atol=1e-4
            )
    for name in ("student-r1", "student"):
        record = read_checkpoint(ran.step(name).folder)
        assert record is not None and record.metrics["before"]["staleness"] < 1e-6
        assert record.metrics["after"]["staleness"] > 1e-6
    measured = json.loads((ran.step("results").folder / "evaluation.json").read_text())
    assert measured["student"]["reverse_kl"] != measured["small"]["reverse_kl"]


@pytest.mark.slow
def test_a_second_run_does_nothing_and_one_round_more_does_that_round(ran: TinyRecipe) -> None:
    before = stamps(ran.root)
    assert teachercache("run", ran.path).code == 0
    assert stamps(ran.root) == before
    assert teachercache("verify", ran.root).code == 0
    events = ran.run("steps.student.rounds=3")
    made = {name for name, state in events.states.items() if state == "pending"}
    assert made == {*ROUND, "results"}
    assert {f"{name}-r2" for name in ROUND} <= set(events.states) - made
    assert {path: stamp for path, stamp in stamps(ran.root).items() if path in before} == before


@pytest.mark.slow
def test_a_run_whose_student_leaves_its_responses_behind_ends_in_one_line(
    ran: TinyRecipe, tmp_path: Path
) -> None:
    copied = ran.copy(tmp_path)
    bounds = ["steps.student.objective.max_staleness=0.000001", "steps.student.max_steps=5"]
    done = teachercache("run", copied.path, *(word for b in bounds for word in ("--set", b)))
    assert done.code != 0
    assert "is 1e-06: take fewer steps or a lower lr and more 'rounds'" in done.error


@pytest.mark.slow
def test_what_people_look_at_shows_the_rounds(ran: TinyRecipe) -> None:
    shown = teachercache("status", ran.path)
    assert shown.code == 0 and "scored-r1" in shown.out and "student-r1" in shown.out
    rows = teachercache("inspect", ran.step("scored").folder)
    assert rows.code == 0 and "least" in rows.out
    report = ran.path.with_name("page.html")
    assert teachercache("report", ran.path, "--output", report).code == 0
    assert "student-r1" in report.read_text()
