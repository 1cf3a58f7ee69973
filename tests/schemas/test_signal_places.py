"""Signals that are not of their input's tokens: ``verify`` and whoever joins them name the row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.verify import verify_folder
from schemas.dataset import open_dataset
from schemas.errors import StoreError
from schemas.row_checks import contradiction_in
from schemas.sample_id import sample_id_of
from schemas.scored_spans import misplaced
from schemas.storage.manifest import Manifest, write_manifest
from schemas.storage.records import ShardRecord, shard_name
from schemas.storage.shards import write_shard
from schemas.table import BoundTable
from schemas.tables.demonstrations import DEMONSTRATIONS
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.episodes import EPISODES
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from schemas.tables.teacher_logits import TOP_K, TopKLogits
from tests.fixtures.demonstration_data import cut
from tests.fixtures.episode_data import as_episode
from tests.fixtures.tiny_responses import make_pair

VOCAB, ROWS, FAULTY = 300, 20, 18
INPUT, SIGNALS = "a" * 64, "b" * 64


def some_input(name: str, index: int) -> tuple[Any, int, int]:
    """A row, the index of the first token that is scored, and how many are."""
    if name == "preference_pairs":
        return make_pair([index, 2], [3, 4], [5]), 2, 3
    if name == "episodes":
        row = as_episode([index, 3, 9, 4, 5], [(0, 1, 2)], 3, [6], [[6], [7]], 0)
        return row, 1, 5
    if name == "demonstrations":  # its query's first token is not scored
        (row,) = cut(
            "episodes", [as_episode([index, 3, 9, 4, 5, 8], [(0, 1, 2)], 3, [6], [[6]], 0)]
        )
        return row, int(row.scored_S2[0, 0]), row.num_positions
    ids_T = np.array([index, 7, 8, 9])
    return Document(sample_id=sample_id_of(ids_T), split="train", input_ids_T=ids_T), 1, 3


def signals(sample_id: str, first_target: int, num_positions: int, k: int = 2) -> TopKLogits:
    return TopKLogits(
        sample_id=sample_id,
        first_target=first_target,
        token_ids_PK=np.tile(np.arange(k), (num_positions, 1)),
        logprobs_PK=np.full((num_positions, k), -np.log(2 * k)),
        rest_logprobs_P=np.full(num_positions, -np.log(2)),
        next_token_logprobs_P=np.full(num_positions, -1.0),
        entropies_P=np.ones(num_positions),
    )


def write(folder: Path, table: BoundTable[Any], rows: list[Any], **names: Any) -> Path:
    file = folder / f"{shard_name(0, 1)}.arrow"
    written = write_shard(file, table, rows)
    record = ShardRecord(
        name=shard_name(0, 1),
        split="train",
        num_rows=written.num_rows,
        num_tokens=sum(row.num_tokens for row in rows),
        num_positions=sum(row.num_positions for row in rows),
        num_bytes=written.num_bytes,
        sha256=written.sha256,
    )
    kind = table.table
    manifest = Manifest(
        table=kind.name,
        version=kind.version,
        variant=kind.variant,
        tokenizer="t",
        vocab_size=VOCAB,
        shards=(record,),
        **names,
    )
    write_manifest(folder, manifest)
    return file


@pytest.mark.parametrize(
    "of", [DOCUMENTS, EPISODES, DEMONSTRATIONS, PREFERENCE_PAIRS], ids=lambda table: table.name
)
@pytest.mark.parametrize(("later", "fewer"), [(0, 0), (1, 0), (0, 1), (0, -1), (1, 1)])
def test_signals_of_other_tokens_than_the_inputs(
    tmp_path: Path, of: Any, later: int, fewer: int
) -> None:
    inputs = [some_input(of.name, index) for index in range(ROWS)]
    rows = [signals(row.sample_id, start, count) for row, start, count in inputs]
    row, start, count = inputs[FAULTY]
    rows[FAULTY] = signals(row.sample_id, start + later, count - fewer)
    folders = [tmp_path / of.name / INPUT[:12], tmp_path / "teacher_logits" / SIGNALS[:12]]
    bound = of.bind(vocab_size=VOCAB)
    write(folders[0], bound, [row for row, _, _ in inputs], fingerprint=INPUT, identity={})
    logits = TOP_K.bind(vocab_size=VOCAB, sizes={"K": 2})
    file = write(folders[1], logits, rows, fingerprint=SIGNALS, identity={"inputs": [INPUT]})
    dataset = open_dataset(folders)
    if not later and not fewer:
        assert [dataset[index]["first_target"] for index in range(ROWS)] == [start] * ROWS
        assert verify_folder(folders[1]) == []
        return
    with pytest.raises(StoreError) as caught:
        [dataset[index] for index in range(ROWS)]
    (line,) = verify_folder(folders[1])
    for said in (str(caught.value), line):
        assert said.startswith(f"{file} row {FAULTY} (sample {row.sample_id}): signals for ")
        assert f"from token {start + later} on, its input has {count} from token {start} on" in said
        assert "delete this shard" in said and "\n" not in said


def test_an_encoder_decoders_signals_are_those_of_the_answer() -> None:
    row, start, count = some_input("demonstrations", 1)
    columns = {name: getattr(row, name) for name in ("input_ids_T", "scored_S2", "answer_start")}
    answer, length = row.answer_start, len(row.input_ids_T) - row.answer_start
    for first, found, fits in (
        (start, count, True),
        (answer, length, True),
        (answer, count, False),
    ):
        signal = signals(row.sample_id, first, found)
        scores = {"first_target": first, "next_token_logprobs_P": signal.next_token_logprobs_P}
        assert (misplaced(columns | scores) == "") is fits


def test_signals_of_a_sample_that_the_input_does_not_have(tmp_path: Path) -> None:
    inputs = [some_input("documents", index) for index in range(ROWS)]
    rows = [signals(row.sample_id, start, count) for row, start, count in inputs]
    rows[FAULTY] = replace(rows[FAULTY], sample_id=sample_id_of(np.array([1])))
    documents, folder = tmp_path / "documents" / INPUT[:12], tmp_path / "teacher_logits" / "b"
    bound = DOCUMENTS.bind(vocab_size=VOCAB)
    write(documents, bound, [row for row, _, _ in inputs], fingerprint=INPUT, identity={})
    logits = TOP_K.bind(vocab_size=VOCAB, sizes={"K": 2})
    write(folder, logits, rows, fingerprint="b", identity={"inputs": [INPUT]})
    (line,) = verify_folder(folder)
    assert f"row {FAULTY} " in line and f"{documents} has no such sample" in line
    documents.rename(tmp_path / "elsewhere")
    assert verify_folder(folder) == []  # nothing to hold it against


@pytest.mark.parametrize("k", [2, 31, 32, 33, 64])
def test_a_token_kept_twice_at_one_position_is_found_for_any_k(k: int) -> None:
    """Few entries are compared each with each, many are sorted."""
    rows = [signals(sample_id_of(np.array([index])), 1, 4, k) for index in range(3)]
    for wrong in (None, (0, 1), (k - 2, k - 1), (0, k - 1)):
        ids_PK = rows[1].token_ids_PK.copy()
        if wrong is not None:
            ids_PK[2, wrong[1]] = ids_PK[2, wrong[0]]
        batch = TOP_K.bind(vocab_size=VOCAB, sizes={"K": k}).to_batch(
            [rows[0], replace(rows[1], token_ids_PK=ids_PK), rows[2]]
        )
        columns = {name: TOP_K.column_values(batch, name) for name in TOP_K.columns}
        found = contradiction_in(batch, columns, TOP_K, VOCAB, "train")
        said = (
            None
            if wrong is None
            else (1, f"token_ids_PK holds id {wrong[0]} twice at one position")
        )
        assert found == said
