"""Pairs in every format and file give the same dialogues, and a bad record is said in one line."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from schemas.errors import ConfigError
from stages.sources.dialogues.dialogue import Message
from stages.sources.preference_pairs.pairs import RawPair
from stages.sources.preference_pairs.readers import read_pairs
from stages.sources.preference_pairs.stage import PairSource, settings_of

EARLIER = [("user", "What is 2 + 2?"), ("assistant", "Four."), ("user", "And twice that?")]
GOOD, BAD = "Eight.", "Nine,\n\nI think."


def write(path: Path, *records: object) -> str:
    path.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode())
    return str(path)


def source(path: str, **settings: Any) -> Any:
    settings = {"kind": "jsonl", "paths": [path]} | settings
    return TypeAdapter(PairSource).validate_python(settings)


def read(path: str, **settings: Any) -> list[RawPair]:
    return list(read_pairs(source(path, **settings)))


def read_one(folder: Path, record: object, **settings: Any) -> RawPair:
    (pair,) = read(write(folder / "pairs.jsonl", record), **settings)
    return pair


def chat(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in said]


def shared(*said: tuple[str, str]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(role, role), "value": text} for role, text in said]


def transcript(*said: tuple[str, str]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[role]}: {text}" for role, text in said)


def whole(response: str, *before: tuple[str, str]) -> list[dict[str, str]]:
    return chat(*(before or EARLIER), ("assistant", response))


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": (
        "standard",
        {"prompt": chat(*EARLIER), "chosen": whole(GOOD)[-1:], "rejected": whole(BAD)[-1:]},
    ),
    "messages and texts": ("standard", {"prompt": chat(*EARLIER), "chosen": GOOD, "rejected": BAD}),
    "whole dialogues": ("standard", {"chosen": whole(GOOD), "rejected": whole(BAD)}),
    "whole dialogues beside their prompt": (
        "standard",
        {"prompt": "And twice that?", "chosen": whole(GOOD), "rejected": whole(BAD)},
    ),
    "continued": (
        "standard",
        {
            "prompt": EARLIER[0][1],
            "chosen": chat(*EARLIER[1:], ("assistant", GOOD)),
            "rejected": chat(*EARLIER[1:], ("assistant", BAD)),
        },
    ),
    "transcripts": (
        "hh_rlhf",
        {
            "chosen": transcript(*EARLIER, ("assistant", GOOD)),
            "rejected": transcript(*EARLIER, ("assistant", BAD)),
        },
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": shared(*EARLIER),
            "chosen": shared(("assistant", GOOD))[0],
            "rejected": shared(("assistant", BAD))[0],
        },
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_format_is_the_same_pair(name: str, tmp_path: Path) -> None:
    form, record = FORMS[name]
    pair = read_one(tmp_path, record, format=form)
    prompt = tuple(Message(*said) for said in EARLIER)
    assert (pair.chosen.prompt, pair.rejected.prompt) == (prompt, prompt)
    assert pair.chosen.response == Message("assistant", GOOD)
    assert pair.rejected.response == Message("assistant", BAD)
    assert pair.place.endswith("pairs.jsonl:1")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("name", ["whole dialogues", "sharegpt", "transcripts"])
def test_columnar_files_hold_the_same_pair(name: str, kind: str, tmp_path: Path) -> None:
    form, record = FORMS[name]
    table, path = pa.Table.from_pylist([record, record]), tmp_path / f"pairs.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as out:
            out.write_table(table)
    first, second = read(str(path), kind=kind, format=form)
    expected = read_one(tmp_path, record, format=form)
    assert (first.chosen, first.rejected) == (expected.chosen, expected.rejected)
    assert second.place.endswith(f"pairs.{kind}:2")


def test_texts_are_kept_as_they_stand_under_columns_of_any_name(tmp_path: Path) -> None:
    record = {"question": " Q\n", "good": " yes ", "bad": "no"}
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    pair = read_one(tmp_path, record, **names)
    assert pair.chosen.prompt == (Message("user", " Q\n"),)
    assert (pair.chosen.response.text, pair.rejected.response.text) == (" yes ", "no")


def test_system_messages_come_first(tmp_path: Path) -> None:
    before = (("system", "Be brief."), EARLIER[0])
    expected = tuple(Message(*said) for said in before)
    form, record = FORMS["sharegpt"]
    for changes in (
        {"conversations": shared(*before)},
        {"conversations": shared(EARLIER[0]), "system": "Be brief."},
    ):
        pair = read_one(tmp_path, record | changes, format=form)
        assert (pair.chosen.prompt, pair.rejected.prompt) == (expected, expected)
    for nothing in ("", None):
        pair = read_one(tmp_path, record | {"system": nothing}, format=form)
        assert pair.chosen.prompt == tuple(Message(*said) for said in EARLIER)
    dialogues = {"chosen": whole(GOOD, *before), "rejected": whole(BAD, *before)}
    assert read_one(tmp_path, dialogues).rejected.prompt == expected


def test_a_transcript_may_end_in_an_empty_turn_or_hold_empty_lines(tmp_path: Path) -> None:
    record = {
        "chosen": "\n\nHuman: Say\n\nHuman nothing.\n\nAssistant:",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c",
    }
    pair = read_one(tmp_path, record, format="hh_rlhf")
    assert pair.chosen.prompt == (Message("user", "Say\n\nHuman nothing."),)
    assert pair.chosen.response == Message("assistant", "")
    assert pair.rejected.response == Message("user", "c")


TEXTS = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("standard", {"prompt": None}, "expected 'prompt' as a text or chat messages, got 'None'"),
        ("standard", {"chosen": 3}, "expected 'chosen' as a text or chat messages, got '3'"),
        ("standard", {"rejected": []}, "expected 'rejected' as a text or chat messages, got '[]'"),
        (
            "standard",
            {"chosen": [{"role": "assistant"}]},
            "expected texts 'role' and 'content' in a message of 'chosen', got \"{'role': 'assis",
        ),
        ("standard", {"prompt": ["q"]}, "in a message of 'prompt', got 'q'"),
        ("standard", {"chosen": "\ud800"}, "'chosen' is not valid Unicode; repair the row"),
        ("hh_rlhf", {}, "'chosen' is 'a', expected a transcript that begins with 'Human:'"),
        (
            "hh_rlhf",
            {"chosen": "So.\n\nHuman: q\n\nAssistant: a"},
            "'chosen' is 'So.\\n\\nHuman: q\\n\\nAssistant: a', expected a transcript",
        ),
        ("hh_rlhf", {"chosen": ["q"]}, "expected a text 'chosen', got a list"),
        ("sharegpt", {}, "expected 'conversations' as a list of messages, got 'None'"),
        (
            "sharegpt",
            {"conversations": shared(EARLIER[0])},
            "expected texts 'from' and 'value' in a message of 'chosen', got 'a'",
        ),
    ],
)
def test_bad_records_are_named_with_their_line(
    form: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = FORMS["sharegpt"][1] if form == "sharegpt" else TEXTS
    if form == "hh_rlhf":
        good = FORMS["transcripts"][1]
    path = write(tmp_path / "pairs.jsonl", good, TEXTS | changes)
    with pytest.raises(ConfigError) as caught:
        read(path, format=form)
    assert "pairs.jsonl:2: " in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_said_with_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", {"instruction": "q", "chosen": "a", "rejected": "b"})
    expected = r"pairs.jsonl:1: expected 'prompt' .*, got only columns instruction, chosen, rejec"
    with pytest.raises(ConfigError, match=expected):
        read(path)


def test_a_source_is_named_by_content_and_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", TEXTS)
    settings = settings_of(source(path))
    (tmp_path / "moved").mkdir()
    moved = Path(path).rename(tmp_path / "moved" / "pairs.jsonl")
    assert settings_of(source(str(moved))) == settings
    assert settings_of(source(str(moved), chosen="better")) != settings
    write(moved, TEXTS, TEXTS)
    assert settings_of(source(str(moved))) != settings
    hub = {"kind": "hub", "name": "x/y", "split": "train", "revision": "a" * 40}
    named = settings_of(TypeAdapter(PairSource).validate_python(hub | {"chosen": "better"}))
    assert named["files"] == [{"name": "x/y//train", "revision": "a" * 40}]
    assert named["chosen"] == "better"
    with pytest.raises(ValidationError, match="'standard', 'hh_rlhf' or 'sharegpt'"):
        source(path, format="alpaca")
