"""Pairs in every format and file give the same dialogues, and a bad record is counted."""

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
from stages.sources.reading.rejects import Rejects

EARLIER = [("user", "What is 2 + 2?"), ("assistant", "Four."), ("user", "And twice that?")]
GOOD, BAD = "Eight.", "Nine,\n\nI think."


def write(path: Path, *records: object) -> str:
    path.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode())
    return str(path)


def source(path: str, **settings: Any) -> Any:
    settings = {"kind": "jsonl", "paths": [path]} | settings
    return TypeAdapter(PairSource).validate_python(settings)


def read(path: str, **settings: Any) -> list[RawPair]:
    return list(read_pairs(source(path, **settings), Rejects()))


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
    ("form", "changes", "reason", "message"),
    [
        ("standard", {"rejected": None}, "missing_text", "'rejected' is null, expected a text or"),
        (
            "standard",
            {"chosen": 3},
            "bad_messages",
            "'chosen' is a int: 3, expected a text or chat",
        ),
        ("standard", {"rejected": []}, "bad_messages", "'rejected' is a list: [], expected a text"),
        (
            "standard",
            {"chosen": [{"role": "assistant"}]},
            "bad_messages",
            "expected texts 'role' and 'content' in a message of 'chosen', got a dict: {'role'",
        ),
        ("standard", {"prompt": ["q"]}, "bad_messages", "in a message of 'prompt', got a str: 'q'"),
        ("standard", {"chosen": "\ud800"}, "invalid_unicode", "'chosen' is not valid Unicode"),
        (
            "hh_rlhf",
            {"chosen": "a"},
            "not_a_transcript",
            "'chosen' is a str: 'a', expected a transcript that begins with 'Human:'",
        ),
        (
            "hh_rlhf",
            {"chosen": "So.\n\nHuman: q\n\nAssistant: a"},
            "not_a_transcript",
            "'chosen' is a str: 'So.\\n\\nHuman: q\\n\\nAssistant: a', expected a transcript",
        ),
        (
            "hh_rlhf",
            {"chosen": ["q"]},
            "not_a_string",
            "'chosen' is a list: ['q'], expected a text",
        ),
        (
            "sharegpt",
            {"conversations": None},
            "missing_text",
            "'conversations' is null, expected a",
        ),
        (
            "sharegpt",
            {"conversations": "q"},
            "bad_messages",
            "is a str: 'q', expected a list of me",
        ),
        ("sharegpt", {"system": 3}, "not_a_string", "'system' is a int: 3, expected a text"),
        (
            "sharegpt",
            {"chosen": "a"},
            "bad_messages",
            "expected texts 'from' and 'value' in a message of 'chosen', got a str: 'a'",
        ),
    ],
)
def test_a_bad_record_is_counted_with_its_place_and_costs_itself_alone(
    form: str, changes: dict[str, Any], reason: str, message: str, tmp_path: Path
) -> None:
    good = next((r for f, r in FORMS.values() if f == form != "standard"), TEXTS)
    path = write(tmp_path / "pairs.jsonl", good, good | changes, good)
    rejects = Rejects()
    assert len(list(read_pairs(source(path, format=form), rejects))) == 2
    assert (rejects.num_read, rejects.malformed) == (3, {reason: 1})
    (row,) = rejects.listed
    assert row["place"].endswith("pairs.jsonl:2") and message in row["detail"]


def test_a_missing_column_is_said_with_those_there_are(tmp_path: Path) -> None:
    wrong = {"instruction": "q", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "pairs.jsonl", {"_about": 1}, wrong, wrong)
    rejects = Rejects()
    assert not list(read_pairs(source(path), rejects))
    with pytest.raises(ConfigError) as caught:
        rejects.require_within(1.0)
    assert str(caught.value).endswith(
        "pairs.jsonl:2: no column 'prompt'; it has 'instruction', 'chosen', 'rejected' "
        "(so are all 3 records read)"
    )


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
