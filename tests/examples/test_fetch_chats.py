"""The examples' chats: one object of messages a line, made whole, which the stage reads."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from examples import fetch_chats
from stages.sources.conversations.readers import read_conversations
from stages.sources.conversations.stage import ChatSource
from stages.sources.reading.rejects import Rejects

INSTRUCTION = {"instruction": "Name a colour.", "input": "Not green.", "output": "Blue."}
PREFERRED = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Tea?"},
        {"from": "gpt", "value": "Yes."},
        {"from": "human", "value": "Milk?"},
    ],
    "chosen": {"from": "gpt", "value": "No."},
    "rejected": {"from": "gpt", "value": "Perhaps."},
}


def test_instructions_and_chats_become_messages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / fetch_chats.INSTRUCTIONS).write_text(json.dumps([INSTRUCTION]))
    (tmp_path / fetch_chats.PREFERRED).write_text(json.dumps([PREFERRED]))
    assert fetch_chats.main(["--cache", str(tmp_path)]) == 0
    made = tmp_path / fetch_chats.CHATS
    source = TypeAdapter(ChatSource).validate_python({"kind": "jsonl", "paths": [str(made)]})
    chats = list(read_conversations(source, Rejects()))
    assert [[(m.role, m.text) for m in chat.messages] for chat in chats] == [
        [("user", "Name a colour.\nNot green."), ("assistant", "Blue.")],
        [
            ("system", "Be brief."),
            ("user", "Tea?"),
            ("assistant", "Yes."),
            ("user", "Milk?"),
            ("assistant", "No."),
        ],
    ]
    assert fetch_chats.main(["--cache", str(tmp_path)]) == 0
    assert f"chats: ready in {made}" in capsys.readouterr().out


def test_what_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_chats.main(["--cache", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert "is not there: run examples/fetch_assets.py first" in printed
    assert len(printed.splitlines()) == 1
