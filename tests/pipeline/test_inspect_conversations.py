"""``inspect`` of conversations: what is read and what is scored, and the teacher's view of that."""

from typing import Any

import numpy as np
import pytest

from pipeline.cache.row_views import Look, scored_tokens, view_of
from schemas.tables.conversations import Conversation
from schemas.tables.teacher_logits import ThresholdLogits
from tests.fixtures.tiny_recipe import TinyRecipe, teachercache
from tests.pipeline.test_inspect_demonstrations import lines_of, printed
from tests.runs.test_chat_recipe import recipe, tables_of

__all__ = ["recipe"]  # a fixture

LOOK = Look(lambda ids: " ".join(map(str, np.asarray(ids).tolist())), 3, 2)


def chat(**changes: Any) -> Conversation:
    columns: dict[str, Any] = {
        "sample_id": "0" * 24,
        "split": "train",
        "source_id": "",
        "input_ids_T": np.arange(10, 20),
        "scored_S2": np.array([[2, 4], [7, 10]]),
        "is_cut": False,
    }
    return Conversation(**columns | changes)


def parts_of(row: Conversation) -> list[list[str]]:
    return [cells for cells in lines_of(printed(*view_of("conversations", row, LOOK))) if cells][1:]


def test_what_is_scored_stands_apart_from_what_is_read() -> None:
    assert parts_of(chat()) == [
        ["read", "0..2", "'10 11'"],
        ["scored 0", "2..4", "'12 13'"],
        ["read", "4..7", "'14 15 16'"],
        ["scored 1", "7..10", "'17 18 19'"],
    ]
    adjacent = chat(scored_S2=np.array([[1, 3], [3, 5]]))
    assert [cells[:2] for cells in parts_of(adjacent)] == [
        ["read", "0..1"], ["scored 0", "1..3"], ["scored 1", "3..5"], ["read", "5..10"]
    ]  # fmt: skip
    prompt = chat(scored_S2=np.zeros((0, 2)))
    assert parts_of(prompt) == [["read", "0..10", "'10 11 12 13 14 15 16 17 18 19'"]]


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "10 tokens, 5 of them scored in 2 spans"),
        ({"is_cut": True}, "10 tokens, 5 of them scored in 2 spans; its end was cut"),
        ({"source_id": "a" * 24}, f"5 of them scored in 2 spans; answers {'a' * 24}"),
        ({"scored_S2": np.zeros((0, 2))}, "10 tokens, a prompt: none is scored"),
    ],
)
def test_the_title_says_what_the_row_is(changes: dict[str, Any], title: str) -> None:
    shown = printed(*view_of("conversations", chat(**changes), LOOK))
    assert title in " ".join(shown.split())


def test_the_teacher_is_shown_at_the_scored_tokens_alone() -> None:
    signal = ThresholdLogits(
        sample_id="0" * 24,
        first_target=2,
        next_token_logprobs_P=np.full(5, -1.0),
        entropies_P=np.ones(5),
        token_ids_PK=np.tile([5, 6], (5, 1)),
        num_head_P=np.zeros(5, np.int64),
        head_codes_E=np.zeros(0, np.int64),
    )
    cells = lines_of(printed(scored_tokens(chat(), signal, LOOK)))
    assert [line[0] for line in cells if line and "token" in line[0]] == [
        "token 2 '12'", "token 3 '13'", "token 7 '17'"
    ]  # fmt: skip


@pytest.mark.slow
def test_a_finished_table_is_shown_as_text(recipe: TinyRecipe) -> None:
    """By its own tokenizer, from the recipe's tables: spans are the assistant's, split is told."""
    ran = recipe.only("chats", "chat_signals", "said")
    ran.run()
    model = str(ran.step("chat_signals").models["teacher"].base)
    folders = {name: ran.step(name).folder for name in ("chats", "chat_signals", "said")}
    of_teacher = ("--signals", folders["chat_signals"], "--positions", "2")
    said = teachercache("inspect", folders["chats"], "--tokenizer", model, *of_teacher)
    assert said.code == 0, said.err
    joined = tables_of(ran, "chats", "chat_signals")
    row = joined[0]
    out = " ".join(said.out.split())
    assert f"sample_id {row['sample_id']} split {row['split']}" in out or joined.num_missing
    assert "'<|im_start|>system" in out and "Be kind." in out and "scored 1" in out
    assert out.count("hidden state only (exact encoding)") == 2
    answers = teachercache("inspect", folders["said"], "--tokenizer", model)
    assert answers.code == 0 and "response 1" in answers.out and "split " in answers.out
    wrong = teachercache("inspect", folders["said"], "--signals", folders["chat_signals"])
    assert wrong.code == 2 and "expected a row of documents, conversations" in wrong.error
