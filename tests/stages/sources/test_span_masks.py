"""Spans of a user's files as a table: which rows have them, and why the others have none."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import ConfigError
from schemas.sample_id import sample_id_of
from schemas.tables.conversations import CONVERSATIONS, Conversation
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.span_masks import SpanMask
from stages.sources.span_masks.stage import SpanMasksStage
from stages.stage import Rejected, StageContext

VOCAB_SIZE = 512
TEXTS = [np.arange(first, first + 10) for first in range(0, 60, 10)]
KEYS = [sample_id_of(ids_T) for ids_T in TEXTS]


def stage_of(path: Path, kind: str = "jsonl", **more: Any) -> SpanMasksStage:
    source = {"kind": kind, "paths": [str(path)], **more}
    return SpanMasksStage.model_validate({"stage": "span_masks", "input": "text", "source": source})


def written(folder: Path, records: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spans.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def made(stage: SpanMasksStage, rows: Sequence[Any]) -> list[Any]:
    table = CONVERSATIONS if isinstance(rows[0], Conversation) else DOCUMENTS
    batch = table.bind(vocab_size=VOCAB_SIZE).to_batch(rows)
    with stage.open(StageContext(folder=Path("unused"), vocab_size=VOCAB_SIZE)) as work:
        return list(work(pa.Table.from_batches([batch])))


def documents() -> list[Document]:
    return [
        Document(sample_id=key, split="train", input_ids_T=ids_T)
        for key, ids_T in zip(KEYS, TEXTS, strict=True)
    ]


def test_each_row_has_its_own_spans_or_a_reason(tmp_path: Path) -> None:
    """By key, whatever the order of the files; a first token is left out, nothing precedes it."""
    records: list[dict[str, Any]] = [
        {"sample_id": KEYS[3], "spans": [[4, 2]]},
        {"sample_id": KEYS[0], "spans": [[2, 4], [4, 5], [8, 10]]},
        {"sample_id": KEYS[4], "spans": "2-4"},
        {"sample_id": KEYS[2], "spans": [[8, 11]]},
        {"sample_id": "of another table", "spans": [[1, 2]]},
        {"sample_id": KEYS[1], "spans": [[0, 1], [0, 3]]},
    ]
    first, second, *others = made(stage_of(written(tmp_path, records)), documents())
    assert isinstance(first, SpanMask) and first.sample_id == KEYS[0]
    assert first.selected_S2.tolist() == [[2, 4], [4, 5], [8, 10]] and first.num_positions == 5
    assert isinstance(second, SpanMask) and second.selected_S2.tolist() == [[1, 3]]
    assert others == [
        Rejected(KEYS[2], "spans do not lie in order within its tokens"),
        Rejected(KEYS[3], "spans do not lie in order within its tokens"),
        Rejected(KEYS[4], "spans are no list of pairs of token indices"),
        Rejected(KEYS[5], "no spans"),
    ]


def test_what_counts_is_a_scored_token(tmp_path: Path) -> None:
    """Of conversations those of the assistant: a mask of the question alone selects nothing."""
    chats, records = [], []
    for ids_T, spans in zip(TEXTS, ([[2, 6]], [[1, 4]], [], [[0, 1]]), strict=False):
        key = sample_id_of(ids_T, [(5, 10)])
        chats.append(
            Conversation(
                sample_id=key,
                split="train",
                source_id="",
                input_ids_T=ids_T,
                scored_S2=np.array([[5, 10]]),
                is_cut=False,
            )
        )
        records.append({"sample_id": key, "spans": spans})
    kept, *rejected = made(stage_of(written(tmp_path, records)), chats)
    assert kept.selected_S2.tolist() == [[2, 6]]
    assert {one.reason for one in rejected} == {"no scored token in its spans"}


def test_two_records_of_one_row_are_not_chosen_from(tmp_path: Path) -> None:
    records = [{"sample_id": KEYS[0], "spans": [[n, n + 1]]} for n in (1, 2)]
    found = made(stage_of(written(tmp_path, records)), documents()[:1])
    assert found == [Rejected(KEYS[0], "more than one record of spans")]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_are_read_from_tables_too(tmp_path: Path, kind: str) -> None:
    table = pa.table({"sample_id": KEYS[:2], "where": [[[1, 2]], [[3, 5], [6, 7]]]})
    path = tmp_path / f"spans.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    found = made(stage_of(path, kind, column="where"), documents()[:2])
    assert [row.selected_S2.tolist() for row in found] == [[[1, 2]], [[3, 5], [6, 7]]]


def test_files_of_other_columns_end_the_run_in_one_line(tmp_path: Path) -> None:
    stage = stage_of(written(tmp_path, [{"sample_id": KEYS[0], "where": [[1, 2]]}]))
    with pytest.raises(ConfigError, match="no column 'spans'; it has") as error:
        made(stage, documents())
    assert "\n" not in str(error.value)


def test_a_step_is_named_by_what_its_files_hold(tmp_path: Path) -> None:
    one, other, changed = (
        stage_of(written(tmp_path / name, [{"sample_id": KEYS[0], "spans": spans}])).hashed()
        for name, spans in (("a", [[1, 2]]), ("b", [[1, 2]]), ("c", [[1, 3]]))
    )
    assert one == other != changed
