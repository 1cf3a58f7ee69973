"""What is found of a record after it was read is listed too: its place, reason and sample."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from stages.sources.documents.stage import IngestStage
from stages.sources.episodes.stage import EpisodesStage
from stages.sources.preference_pairs.stage import PreferencePairsStage
from stages.sources.reading.rejects import LISTED


def write(path: Path, records: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def listed(prepared: Any) -> list[tuple[str, str]]:
    """Places and reasons; each reason is listed as often as it is counted, up to the limit."""
    reasons = Counter(row["reason"] for row in prepared.rejected)
    for reason, count in reasons.items():
        assert count == min(LISTED, prepared.rejects[reason])
    return [(row["place"], row["reason"]) for row in prepared.rejected]


def detail_of(rejected: Sequence[Mapping[str, str]], reason: str) -> str:
    return next(row["detail"] for row in rejected if row["reason"] == reason)


def test_pairs(tiny_model: Path, tmp_path: Path) -> None:
    records = [
        {"prompt": "What is it?", "chosen": "A house.", "rejected": "A dog."},
        {"prompt": "Why?", "chosen": "Because.", "rejected": "So."},
        {"prompt": "What is it?", "chosen": "A house.", "rejected": "A dog."},
        {"prompt": "Same", "chosen": "one", "rejected": "one"},
        {"prompt": "Long " * 40, "chosen": "a", "rejected": "b"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
    ]
    path = write(tmp_path / "pairs.jsonl", records)
    stage = PreferencePairsStage.model_validate(
        {
            "stage": "preference_pairs",
            "source": {"kind": "jsonl", "paths": [path], "format": "standard"},
            "tokenizer": str(tiny_model),
            "template": "plain",
            "max_prompt_length": 30,
            "max_response_length": 20,
            "heldout_fraction": 0.0,
        }
    )
    prepared = stage.prepare(tmp_path / "work")
    assert listed(prepared) == [
        (f"{path}:3", "duplicate_pair"),
        (f"{path}:4", "same_response"),
        (f"{path}:5", "prompt_too_long"),
        (f"{path}:6", "empty_prompt"),
    ]
    rows = [
        row for index in range(len(prepared.shards)) for row in stage.read(tmp_path / "work", index)
    ]
    said = detail_of(prepared.rejected, "duplicate_pair")
    assert said in [f"sample {row.sample_id} is that of {path}:1" for row in rows]
    assert detail_of(prepared.rejected, "same_response") == "the pair after 'Same'"


@pytest.mark.parametrize("segment_bytes", [300, 1 << 20])
def test_documents(segment_bytes: int, tiny_model: Path, tmp_path: Path) -> None:
    """Of one segment a duplicate is known by its line, of several by how it begins."""
    texts = [f"the house and the dog of number {index}" for index in range(40)]
    again = [texts[0]] * 130
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in [*texts, *again, "x"]])
    stage = IngestStage.model_validate(
        {
            "stage": "ingest",
            "source": {"kind": "jsonl", "paths": [path]},
            "tokenizer": str(tiny_model),
            "length": 16,
            "mode": "truncate",
            "heldout_fraction": 0.0,
        }
    )
    prepared = stage.work.prepare(stage, tmp_path / "work", segment_bytes=segment_bytes)
    found = listed(prepared)
    assert prepared.rejects["duplicate"] == 130
    places = [place for place, reason in found if reason == "duplicate"]
    assert len(places) == LISTED
    assert {repr(texts[0]), *(f"{path}:{line}" for line in range(41, 171))} >= {*places}
    assert (repr("x"), "too_few_tokens") in found
    assert detail_of(prepared.rejected, "too_few_tokens") == "1 tokens, a row has 2 at least"


def test_examples_and_episodes(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"q": f"number {i}", "a": "good" if i % 2 else "bad"} for i in range(8)]
    long = [{"q": f"{i} {'word ' * 80}", "a": "bad"} for i in range(3)]  # two are supports at most
    path = write(tmp_path / "task.jsonl", [*rows, rows[3], *long])
    stage = EpisodesStage.model_validate(
        {
            "stage": "episodes",
            "sources": [
                {
                    "kind": "rows",
                    "name": "t",
                    "task_kind": "classification",
                    "source": {"kind": "jsonl", "paths": [path]},
                    "input": "q",
                    "output": "a",
                }
            ],
            "tokenizer": str(tiny_model),
            "targets": ["t"],
            "paradigm": "meta",
            "draw": "resample",
            "demonstrations": 0,
            "support": 2,
            "max_length": 60,
        }
    )
    prepared = stage.prepare(tmp_path / "work")
    assert (f"{path}:9", "duplicate_example") in listed(prepared)
    assert detail_of(prepared.rejected, "duplicate_example") == f"task 't' has it at {path}:4"
    places = {place for place, reason in listed(prepared) if reason == "too_long"}
    assert places and places <= {f"{path}:{line}" for line in (10, 11, 12)}
    assert " word word" in detail_of(prepared.rejected, "too_long")
