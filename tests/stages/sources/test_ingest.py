"""Ingest: the right rows, every document accounted for, the same bytes however it is run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from schemas.errors import RejectLimitError, StoreError
from schemas.sample_id import sample_id_of
from schemas.tables.documents import Document
from stages.sources.documents.prepared import PreparedSource
from stages.sources.documents.stage import IngestStage
from stages.sources.prepared import within
from stages.sources.reading.cleaning import clean
from stages.sources.reading.tokens import TextTokenizer
from tests.servers.warm_python import WarmProcess

WORDS = (
    "the cat sat on a mat while some old dogs ran over red hills near blue water".split()  # noqa: SIM905
)
LENGTH = 16
TINY = 600  # bytes a segment: many segments, many ranges


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 40, count)
    return [f"{i} " + " ".join(rng.choice(WORDS, size)) for i, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sentences(200), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    wrapped.save_pretrained(folder)
    config = {"vocab_size": len(wrapped), "max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_jsonl(path: Path, texts: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def stage_for(path: Path, tokenizer: Path, **changes: Any) -> IngestStage:
    settings: dict[str, Any] = {
        "stage": "ingest",
        "source": {"kind": "jsonl", "paths": [str(path)]},
        "tokenizer": str(tokenizer),
        "length": LENGTH,
        "mode": "pack",
        "heldout_fraction": 0.2,
        "rows_per_shard": 10,
    }
    return IngestStage.model_validate(settings | changes)


def all_rows(stage: IngestStage, work_dir: Path, prepared: PreparedSource) -> list[Document]:
    rows = []
    for index, shard in enumerate(prepared.shards):
        of_shard = list(stage.read(work_dir, index))
        assert len(of_shard) == shard.rows
        assert {row.split for row in of_shard} == {shard.split}
        rows += of_shard
    return rows


def as_bytes(rows: Sequence[Document]) -> list[tuple[str, str, bytes]]:
    return [(row.sample_id, row.split, row.input_ids_T.tobytes()) for row in rows]


def split_of(key: bytes, fraction: float) -> str:
    return "heldout" if int.from_bytes(key[8:], "big") / 2**64 < fraction else "train"


def reference_streams(texts: Sequence[str], tokenizer: Path) -> dict[str, list[int]]:
    """All ids of each split: distinct texts in the order of their keys, an EOS after each."""
    opened = TextTokenizer(tokenizer)
    cleaned = [clean(text, min_chars=1, max_chars=1000) for text in texts]
    by_key = {document.key: document.text for document in cleaned if not isinstance(document, str)}
    streams: dict[str, list[int]] = {"train": [], "heldout": []}
    for key in sorted(by_key):
        ids_T = opened.encode([by_key[key]])[0]
        assert opened.eos_id is not None
        streams[split_of(key, 0.2)] += [*ids_T.tolist(), opened.eos_id]
    return streams


def test_packed_rows_are_the_pieces_of_the_stream(tokenizer: Path, tmp_path: Path) -> None:
    texts = sentences(60)
    stage = stage_for(write_jsonl(tmp_path / "a.jsonl", texts), tokenizer)
    prepared = stage.work.prepare(stage, tmp_path / "work")
    rows = all_rows(stage, tmp_path / "work", prepared)
    for split, stream in reference_streams(texts, tokenizer).items():
        whole = len(stream) // LENGTH
        expected = np.array(stream[: whole * LENGTH]).reshape(whole, LENGTH).tolist()
        found = [row.input_ids_T.tolist() for row in rows if row.split == split]
        assert sorted(found) == sorted(expected)
    assert prepared.documents_read == 60
    assert prepared.rejects == {"packing_remainder": 2}
    assert [shard.split for shard in prepared.shards] == sorted(
        (shard.split for shard in prepared.shards), reverse=True
    )


def test_rows_are_keyed_and_ordered_by_sample_id(tokenizer: Path, tmp_path: Path) -> None:
    stage = stage_for(write_jsonl(tmp_path / "a.jsonl", sentences(60)), tokenizer)
    rows = all_rows(stage, tmp_path / "work", stage.work.prepare(stage, tmp_path / "work"))
    assert all(row.sample_id == sample_id_of(row.input_ids_T) for row in rows)
    train = [row.sample_id for row in rows if row.split == "train"]
    assert train == sorted(train)


@pytest.mark.parametrize("segment_bytes", [TINY, 1 << 20])
def test_truncated_rows_and_every_document_accounted_for(
    segment_bytes: int, tokenizer: Path, tmp_path: Path
) -> None:
    head = " ".join(WORDS)
    good = [*sentences(30), head + " one", head + " two"]  # the last two differ past 16 tokens
    bad = [None, 7, {"a": 1}, "", " \n ", "ab", "\ud800 lone surrogate", "x" * 2000]
    again = [good[0], "  " + good[1].replace(" ", "\n"), *good[2:6] * 3]
    path = write_jsonl(tmp_path / "a.jsonl", [*good, *bad, *again])
    with path.open("ab") as stream:
        stream.write(b'\n{"other": "no text here"}\n{"text": "bad \xff byte"}\n{"text": "a"}')
    settings: dict[str, Any] = {"mode": "truncate", "min_chars": 1, "max_chars": 1000}
    strict = stage_for(path, tokenizer, **settings)
    with pytest.raises(RejectLimitError, match="6 of 57 records are malformed, more than max_rej"):
        strict.work.prepare(strict, tmp_path / "work", segment_bytes=segment_bytes)
    stage = stage_for(path, tokenizer, **settings, max_rejected_fraction=0.2)
    assert stage.hashed() == strict.hashed()
    prepared = stage.work.prepare(stage, tmp_path / "work", segment_bytes=segment_bytes)
    rows = all_rows(stage, tmp_path / "work", prepared)
    assert prepared.rejects == {
        "duplicate": len(again),
        "duplicate_sequence": 1,
        "empty_text": 2,
        "invalid_unicode": 2,
        "missing_column": 1,
        "missing_text": 1,
        "not_a_string": 2,
        "too_few_tokens": 1,
        "too_long": 1,
    }
    accounted = len(rows) + sum(prepared.rejects.values())
    assert prepared.documents_read == accounted == len(good) + len(bad) + len(again) + 3
    encoded = TextTokenizer(tokenizer).encode([*good, "ab"])
    assert {row.input_ids_T.tobytes() for row in rows} == {t[:LENGTH].tobytes() for t in encoded}
    assert prepared.truncated == sum(len(ids_T) > LENGTH for ids_T in encoded)


def test_min_chars_counts_normalised_text(tokenizer: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["ab" + " " * 50, *sentences(20)])
    stage = stage_for(path, tokenizer, min_chars=10, heldout_fraction=0.0)
    assert stage.work.prepare(stage, tmp_path / "work").rejects == {
        "packing_remainder": 1,
        "too_short": 1,
    }


@pytest.mark.parametrize("mode", ["pack", "truncate"])
def test_bytes_do_not_depend_on_segments_or_on_how_files_are_cut(
    mode: str, tokenizer: Path, tmp_path: Path
) -> None:
    texts = sentences(80)
    one = stage_for(write_jsonl(tmp_path / "one.jsonl", texts + texts[:9]), tokenizer, mode=mode)
    for number, part in enumerate((texts[50:], texts[:60])):
        write_jsonl(tmp_path / f"part-{number}.jsonl", part)
    parts = stage_for(tmp_path / "part-*.jsonl", tokenizer, mode=mode)
    found = []
    for number, (stage, segment_bytes) in enumerate(((one, 1 << 20), (one, TINY), (parts, 2000))):
        work = tmp_path / f"work-{number}"
        prepared = stage.work.prepare(stage, work, segment_bytes=segment_bytes)
        found.append(as_bytes(all_rows(stage, work, prepared)))
    assert found[0] == found[1] == found[2]


def test_duplicates_never_straddle_the_split_and_more_text_moves_nothing(
    tokenizer: Path, tmp_path: Path
) -> None:
    texts = sentences(60)
    few = stage_for(write_jsonl(tmp_path / "few.jsonl", texts), tokenizer, mode="truncate")
    spaced = [text.replace(" ", "  ") for text in texts] + sentences(50, seed=1)
    more = stage_for(
        write_jsonl(tmp_path / "more.jsonl", texts + spaced), tokenizer, mode="truncate"
    )
    splits = []
    for stage, name in ((few, "w1"), (more, "w2")):
        rows = all_rows(
            stage, tmp_path / name, stage.work.prepare(stage, tmp_path / name, segment_bytes=TINY)
        )
        splits.append({row.sample_id: row.split for row in rows})
        assert len(splits[-1]) == len(rows)
    assert set(splits[0].values()) == {"train", "heldout"}
    assert all(splits[1][sample_id] == split for sample_id, split in splits[0].items())


def test_done_work_is_not_done_again_and_another_config_never_meets_it(
    tokenizer: Path, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sentences(60))
    work = tmp_path / "work"
    stage = stage_for(path, tokenizer)
    prepared = stage.work.prepare(stage, work, segment_bytes=TINY)
    stamps = {file: file.stat().st_mtime_ns for file in work.rglob("*.*")}
    assert stage.work.prepare(stage, work, segment_bytes=TINY) == prepared
    assert {file: file.stat().st_mtime_ns for file in work.rglob("*.*")} == stamps
    assert sorted(file.name for file in work.iterdir()) == ["prepared.json", "rows", "work.json"]
    other = stage_for(path, tokenizer, length=8)
    rows = all_rows(other, work, other.work.prepare(other, work, segment_bytes=TINY))
    assert {len(row.input_ids_T) for row in rows} == {8}
    write_jsonl(path, sentences(30))
    assert other.work.prepare(other, work, segment_bytes=TINY).documents_read == 30


def test_interrupted_reading_goes_on_where_it_stopped(tokenizer: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [3, *sentences(600)])
    work, stage = tmp_path / "work", stage_for(path, tokenizer)
    said: list[str] = []

    def interrupt(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.work.prepare(stage, work, interrupt, segment_bytes=20_000)
    finished = {file: file.stat().st_mtime_ns for file in (work / "documents").iterdir()}
    assert len(finished) > 1
    prepared = stage.work.prepare(stage, work, said.append, segment_bytes=20_000)
    read = [int(line.split()[0]) for line in said if line.endswith("documents read")]
    assert read == sorted(set(read))  # no segment was read twice
    assert prepared.documents_read == 601
    assert [row["place"] for row in prepared.rejected] == [f"{path}:1"]
    fresh = stage.work.prepare(stage, tmp_path / "fresh", segment_bytes=20_000)
    assert prepared == fresh
    assert as_bytes(all_rows(stage, work, prepared)) == as_bytes(
        all_rows(stage, tmp_path / "fresh", fresh)
    )


POINTS = ("documents/*0", "documents/*5", "sequences/*3", "rows/*5")
RUN = """
import sys
from pathlib import Path
from stages.sources.documents.stage import IngestStage
stage = IngestStage.model_validate_json(sys.argv[1])
stage.work.prepare(stage, Path(sys.argv[2]), segment_bytes=int(sys.argv[3]))
"""


@pytest.mark.slow
def test_killed_at_any_point_the_bytes_are_the_same(tokenizer: Path, tmp_path: Path) -> None:
    stage = stage_for(write_jsonl(tmp_path / "a.jsonl", sentences(3000)), tokenizer)
    whole, work = tmp_path / "whole", tmp_path / "work"
    expected = stage.work.prepare(stage, whole, segment_bytes=20_000)
    words = ["-c", stage.model_dump_json(), str(work), "20000"]
    kills = 0
    for pattern in (f"{name}.arrow" for name in POINTS):
        with WarmProcess(RUN, words, dict(os.environ)) as process:
            while process.poll() is None and not list(work.glob(pattern)):
                time.sleep(0.001)
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
    assert kills >= 3
    assert WarmProcess(RUN, words, dict(os.environ)).wait() == 0
    prepared = stage.work.prepare(stage, work, segment_bytes=20_000)
    assert prepared == expected
    assert as_bytes(all_rows(stage, work, prepared)) == as_bytes(all_rows(stage, whole, expected))


def test_reading_before_preparing_or_after_damage_is_a_store_error(
    tokenizer: Path, tmp_path: Path
) -> None:
    stage = stage_for(write_jsonl(tmp_path / "a.jsonl", sentences(60)), tokenizer)
    work = tmp_path / "work"
    with pytest.raises(StoreError, match="holds no complete ingest"):
        list(stage.read(work, 0))
    stage.work.prepare(stage, work)
    file = next((work / "rows").iterdir())
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(StoreError, match=r"delete .* and run again"):
        list(stage.read(work, 0))


def test_planning_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'polars', 'tokenizers'}"
    code = f"import sys, stages.sources.documents.stage; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_max_rows_shares_itself_between_the_splits() -> None:
    assert within({"train": 90, "heldout": 10}, None) == {"train": 90, "heldout": 10}
    assert within({"train": 90, "heldout": 10}, 20) == {"train": 18, "heldout": 2}
    assert within({"train": 999, "heldout": 1}, 20) == {"train": 19, "heldout": 1}
    assert within({"train": 5, "heldout": 0}, 3) == {"train": 3, "heldout": 0}


def test_max_rows_keeps_the_first_rows_and_counts_the_rest(tokenizer: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sentences(60))
    whole, part = stage_for(path, tokenizer), stage_for(path, tokenizer, max_rows=12)
    all_prepared, prepared = (
        whole.work.prepare(whole, tmp_path / "all"),
        part.work.prepare(part, tmp_path / "part"),
    )
    everything = as_bytes(all_rows(whole, tmp_path / "all", all_prepared))
    kept = as_bytes(all_rows(part, tmp_path / "part", prepared))
    for split in ("train", "heldout"):
        ours, theirs = ([row for row in rows if row[1] == split] for rows in (kept, everything))
        assert ours == theirs[: len(ours)] and len(ours) < len(theirs)
    assert len(kept) <= 12
    assert prepared.rejects["beyond_max_rows"] == len(everything) - len(kept)
