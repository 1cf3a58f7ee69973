"""The examples' pairs: one object a line, made once and whole, and read by the stage's readers."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from examples import fetch_pairs
from stages.sources.preference_pairs.readers import read_pairs
from stages.sources.preference_pairs.stage import PairSource
from stages.sources.reading.rejects import Rejects

PAIR = {
    "conversations": [{"from": "human", "value": "Caf\u00e9\u2028or tea?"}],
    "chosen": {"from": "gpt", "value": "Tea."},
    "rejected": {"from": "gpt", "value": "No."},
}


def test_a_list_becomes_lines_that_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, made = tmp_path / fetch_pairs.SOURCE, tmp_path / fetch_pairs.PAIRS
    text.parent.mkdir()
    text.write_text(json.dumps([PAIR, PAIR], indent=2))
    assert fetch_pairs.main(["--cache", str(tmp_path)]) == 0
    settings = {"kind": "jsonl", "paths": [str(made)], "format": "sharegpt"}
    pairs = list(read_pairs(TypeAdapter(PairSource).validate_python(settings), Rejects()))
    assert [pair.chosen.prompt[0].text for pair in pairs] == ["Caf\u00e9\u2028or tea?"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs", "text"]
    before = made.stat()
    text.unlink()
    assert fetch_pairs.main(["--cache", str(tmp_path)]) == 0
    assert made.stat().st_mtime_ns == before.st_mtime_ns
    assert f"pairs: ready in {made}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "is not there: run examples/fetch_assets.py first"),
        ("[{]", "is not JSON (Expecting"),
        ('{"a": 1}', "is no list of objects with chosen, conversations, rejected"),
        ('[{"chosen": 1}]', "is no list of objects with chosen, conversations, rejected"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(
    body: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / fetch_pairs.SOURCE
    text.parent.mkdir()
    if body is not None:
        text.write_text(body)
    assert fetch_pairs.main(["--cache", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert message in printed and len(printed.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
