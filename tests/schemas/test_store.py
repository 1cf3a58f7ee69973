"""Shards, records, manifests and opening them: what is refused, what survives."""

import dataclasses
import errno
import json
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache.verify import verify_folder
from schemas import open_table
from schemas.dataset import open_dataset
from schemas.errors import ConfigError, IdentityMismatch, SchemaMismatch, StoreError
from schemas.sample_id import sample_id_of
from schemas.storage.files import atomic_file
from schemas.storage.manifest import Manifest, damaged_shards, read_manifest, write_manifest
from schemas.storage.records import (
    ShardRecord,
    listed_shards,
    read_record,
    shard_index,
    shard_name,
    write_record,
)
from schemas.storage.shard_list import ShardListBuilder
from schemas.storage.shards import ROWS_PER_BATCH, read_shard, write_shard
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.teacher_logits import TOP_K, TopKLogits

VOCAB_SIZE = 512
NUM_SHARDS, ROWS = 3, 20
BOUND = DOCUMENTS.bind(vocab_size=VOCAB_SIZE)


def document(index: int) -> Document:
    ids_T = (np.arange(6) * 7 + index) % VOCAB_SIZE
    split = "train" if index < 2 * ROWS else "heldout"
    return Document(sample_id=sample_id_of(ids_T), split=split, input_ids_T=ids_T)


def top_k_row(of: Document) -> TopKLogits:
    num_positions = len(of.input_ids_T) - 1
    mark = float(of.input_ids_T[0])  # to see later which document a row came from
    return TopKLogits(
        sample_id=of.sample_id,
        first_target=1,
        token_ids_PK=np.tile(np.arange(2), (num_positions, 1)),
        logprobs_PK=np.zeros((num_positions, 2), np.float16),
        rest_logprobs_P=np.zeros(num_positions, np.float16),
        next_token_logprobs_P=np.full(num_positions, -mark, np.float16),
        entropies_P=np.zeros(num_positions, np.float16),
    )


def write_documents(folder: Path, *, tokenizer: str = "t", vocabulary: str = "") -> Manifest:
    records = []
    for index in range(NUM_SHARDS):
        rows = [document(index * ROWS + row) for row in range(ROWS)]
        name = shard_name(index, NUM_SHARDS)
        file = write_shard(folder / f"{name}.arrow", BOUND, rows)
        record = ShardRecord(
            name=name,
            split=rows[0].split,
            num_rows=file.num_rows,
            num_tokens=6 * ROWS,
            num_positions=0,
            num_bytes=file.num_bytes,
            sha256=file.sha256,
        )
        write_record(folder, record, {"seconds": 1.0})
        records.append(record)
    manifest = Manifest(
        table="documents",
        version=DOCUMENTS.version,
        variant="",
        fingerprint="f" * 64,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        vocab_size=VOCAB_SIZE,
        identity={},
        shards=tuple(records),
    )
    write_manifest(folder, manifest)
    return manifest


def write_signals(
    folder: Path, documents: list[Document], *, tokenizer: str = "t", vocabulary: str = ""
) -> None:
    bound = TOP_K.bind(vocab_size=VOCAB_SIZE, sizes={"K": 2})
    name = shard_name(0, 1)
    file = write_shard(folder / f"{name}.arrow", bound, map(top_k_row, documents))
    record = ShardRecord(
        name=name,
        split="train",
        num_rows=file.num_rows,
        num_tokens=6 * file.num_rows,
        num_positions=5 * file.num_rows,
        num_bytes=file.num_bytes,
        sha256=file.sha256,
    )
    manifest = Manifest(
        table="teacher_logits",
        version=TOP_K.version,
        variant="top_k",
        fingerprint="e" * 64,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        vocab_size=VOCAB_SIZE,
        identity={},
        shards=(record,),
    )
    write_manifest(folder, manifest)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    write_documents(tmp_path / "documents")
    return tmp_path / "documents"


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (write_documents(tmp_path / name) for name in ("one", "two"))
    assert one.dataset_id == two.dataset_id
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> Iterator[Document]:
        yield document(0)
        raise ValueError("the engine fell over")

    with pytest.raises(ValueError, match="fell over"):
        write_shard(tmp_path / "shard.arrow", BOUND, rows())
    assert list(tmp_path.iterdir()) == []


def test_no_space_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match=r"no space left writing .*run again"),
        atomic_file(tmp_path / "shard.arrow") as stream,
    ):
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_table_without_manifest_is_not_finished(documents: Path) -> None:
    (documents / "manifest.json").unlink()
    with pytest.raises(
        StoreError, match=r"is not finished: it has no manifest.json; run the recipe"
    ):
        open_dataset([documents])
    with pytest.raises(StoreError, match="does not exist"):
        open_dataset([documents.parent / "nowhere"])


def test_one_flipped_byte_is_found_and_named(documents: Path) -> None:
    path = documents / "shard-00001-of-00003.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"shard-00001-of-00003\.arrow has sha256"):
        open_dataset([documents])
    manifest = read_manifest(documents)
    assert len(damaged_shards(documents, manifest)) == 1
    assert read_record(documents, "shard-00001-of-00003") is None
    assert read_record(documents, "shard-00000-of-00003") is not None


def test_swapped_shards_and_cut_files_are_found(documents: Path) -> None:
    zero, one = (documents / f"shard-0000{i}-of-00003.arrow" for i in (0, 1))
    first, second = zero.read_bytes(), one.read_bytes()
    zero.write_bytes(second)
    one.write_bytes(first)
    assert len(damaged_shards(documents, read_manifest(documents))) == 2
    zero.write_bytes(first[:-100])
    with pytest.raises(StoreError, match="cannot read shard"):
        read_shard(zero)


def test_a_manifest_edited_by_hand_is_refused(documents: Path) -> None:
    path = documents / "manifest.json"
    body = json.loads(path.read_text())
    body["totals"]["num_rows"] += 1
    path.write_text(json.dumps(body))
    with pytest.raises(StoreError, match=r"shards\.feather is not the list .*num_rows=60.*=61"):
        open_dataset([documents])
    path.write_text(json.dumps({**body, "format": 1, "shards": []}))
    with pytest.raises(SchemaMismatch, match="has format 1, this version reads format 2: delete"):
        read_manifest(documents)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(StoreError, match="is damaged"):
        read_manifest(documents)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_list_of_shards_that_is_not_the_manifests_is_refused(
    documents: Path, damage: str
) -> None:
    path = documents / "shards.feather"
    content = bytearray(path.read_bytes())
    content[content.index(b"heldout")] ^= 1
    match damage:
        case "flip":
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[:-100])
        case _:
            path.unlink()
    manifest = read_manifest(documents)
    assert (manifest.num_rows, len(manifest.shards)) == (NUM_SHARDS * ROWS, NUM_SHARDS)
    with pytest.raises(StoreError, match=r"shards\.feather is not the list of shards .*delete the"):
        open_dataset([documents])
    (problem,) = verify_folder(documents)
    assert "shards.feather is not the list of shards" in problem


def test_shards_are_a_sequence_of_the_records_that_were_written(documents: Path) -> None:
    """Whatever the order they came in; a later record of a shard takes an earlier one's place."""
    shards = read_manifest(documents).shards
    written = write_documents(documents).shards
    assert list(shards) == [shards[0], shards[1], shards[-1]] == list(written) and shards == written
    assert [shard.name for shard in shards[1:]] == [shard_name(i, NUM_SHARDS) for i in (1, 2)]
    with pytest.raises(IndexError):
        shards[NUM_SHARDS]
    builder = ShardListBuilder()
    for index in (2, 0, 1):
        builder.add(index, dataclasses.replace(shards[index], num_rows=7))
    for index in (1, 2, 0):
        rejects = {"too_short": 1, "empty": index + 1}
        builder.add(index, dataclasses.replace(shards[index], rejects=rejects))
    built = builder.finish()
    assert built.totals.num_rows == NUM_SHARDS * ROWS
    assert built.totals.rejects == {"empty": 6, "too_short": 3}
    assert built[1].rejects == {"empty": 2, "too_short": 1}
    assert dataclasses.replace(built[1], rejects={}) == shards[1]


def test_names_of_shards_sort_by_index_and_are_found_in_one_listing(tmp_path: Path) -> None:
    assert shard_name(7, 99_999) == "shard-00007-of-99999"
    names = [shard_name(index, 1_000_000) for index in (9, 10, 99_999, 100_000, 999_999)]
    assert names == sorted(names) and shard_index(names[3]) == 100_000
    for name in (names[0], names[3], shard_name(5, 999_999), "shard-x-of-1000000", ".lock"):
        (tmp_path / f"{name}.json").touch()
    (tmp_path / f"{names[1]}.arrow").touch()
    (tmp_path / f"{names[1]}.json.tmp-1").touch()
    found = listed_shards(tmp_path, 1_000_000, ".json")
    assert np.flatnonzero(found).tolist() == [9, 100_000]
    assert not listed_shards(tmp_path / "nowhere", 3, ".json").any()


def test_another_table_version_is_refused(documents: Path) -> None:
    manifest = dataclasses.replace(read_manifest(documents), version=99)
    write_manifest(documents, manifest)
    with pytest.raises(SchemaMismatch, match="version 99, this code reads version 1"):
        open_dataset([documents])


def test_tables_of_two_tokenizers_are_refused(documents: Path, tmp_path: Path) -> None:
    write_signals(tmp_path / "signals", [document(0)], tokenizer="other")
    with pytest.raises(IdentityMismatch, match=r"ids of tokenizer other.*of t"):
        open_dataset([documents, tmp_path / "signals"])
    write_documents(tmp_path / "documents", vocabulary="v")
    with pytest.raises(IdentityMismatch, match=r"ids of tokenizer other.*of t"):
        open_dataset([tmp_path / "documents", tmp_path / "signals"])


def test_tables_of_two_tokenizers_with_one_vocabulary_are_one_data_set(tmp_path: Path) -> None:
    written = write_documents(tmp_path / "documents", vocabulary="v")
    first = next(iter(open_dataset([tmp_path / "documents"])))["sample_id"]
    assert written.vocabulary == "v"
    write_signals(tmp_path / "signals", [document(0)], tokenizer="other", vocabulary="v")
    assert open_dataset([tmp_path / "documents", tmp_path / "signals"])[0]["sample_id"] == first


def test_a_manifest_of_before_vocabularies_is_read(documents: Path) -> None:
    body = json.loads((documents / "manifest.json").read_text())
    assert body.pop("vocabulary") == ""
    (documents / "manifest.json").write_text(json.dumps(body))
    assert read_manifest(documents).has_ids_of("t", "v")
    assert not read_manifest(documents).has_ids_of("other", "")


def test_rows_are_joined_by_key_whatever_the_order_and_missing_ones_counted(
    documents: Path, tmp_path: Path
) -> None:
    kept = [document(index) for index in range(39, -1, -1) if index % 5]
    write_signals(tmp_path / "signals", kept)
    dataset = open_dataset([documents, tmp_path / "signals"], split="train")
    assert (len(dataset), dataset.num_missing) == (32, 8)
    for index in range(len(dataset)):
        row = dataset[index]
        assert row["sample_id"] == sample_id_of(row["input_ids_T"])
        assert row["next_token_logprobs_P"][0] == -float(row["input_ids_T"][0])


def test_tables_without_a_common_row_are_refused(documents: Path, tmp_path: Path) -> None:
    write_signals(tmp_path / "signals", [document(400)])
    with pytest.raises(IdentityMismatch, match="were they made from the same input"):
        open_dataset([documents, tmp_path / "signals"], split="train")


def test_splits_are_apart(documents: Path) -> None:
    train, heldout = (open_dataset([documents], split=s) for s in ("train", "heldout"))
    assert (len(train), len(heldout)) == (2 * ROWS, ROWS)
    assert {train[i]["split"] for i in range(len(train))} == {"train"}
    with pytest.raises(ConfigError, match="no row in split 'test'"):
        open_dataset([documents], split="test")


def test_every_row_can_be_read_in_any_order_and_from_a_copy(documents: Path) -> None:
    dataset = open_dataset([documents])
    assert ROWS > ROWS_PER_BATCH  # so that shards have more than one batch
    copy = pickle.loads(pickle.dumps(dataset))
    for index in reversed(range(len(dataset))):
        np.testing.assert_array_equal(dataset[index]["input_ids_T"], document(index).input_ids_T)
        assert copy[index]["sample_id"] == dataset[index]["sample_id"]


def test_ranks_share_an_epoch_and_resume_where_they_stopped(documents: Path) -> None:
    dataset = open_dataset([documents])
    whole = dataset.epoch_order(seed=3, epoch=1)
    assert sorted(whole.tolist()) == list(range(len(dataset)))
    assert whole.tolist() != dataset.epoch_order(seed=3, epoch=2).tolist()
    ranks = [dataset.epoch_order(seed=3, epoch=1, rank=r, world_size=2) for r in (0, 1)]
    assert sorted(np.concatenate(ranks).tolist()) == list(range(len(dataset)))
    rest = dataset.epoch_order(seed=3, epoch=1, rank=1, world_size=2, start=10)
    np.testing.assert_array_equal(rest, ranks[1][10:])


def test_records_that_do_not_verify_are_redone(documents: Path) -> None:
    name = shard_name(0, NUM_SHARDS)
    assert read_record(documents, name) is not None
    (documents / f"{name}.json").write_text("{")
    assert read_record(documents, name) is None
    write_documents(documents)
    (documents / f"{name}.arrow").unlink()
    assert read_record(documents, name) is None


def test_a_table_of_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    """Readers are given up as others are needed; so are those of tables on this machine."""
    num_shards = 200
    rows = [document(index) for index in range(num_shards)]
    for index, row in enumerate(rows):
        write_shard(tmp_path / f"{shard_name(index, num_shards)}.arrow", BOUND, [row])
    records = [
        ShardRecord(
            name=shard_name(index, num_shards),
            split=row.split,
            num_rows=1,
            num_tokens=6,
            num_positions=0,
            num_bytes=1,
            sha256="0" * 64,
        )
        for index, row in enumerate(rows)
    ]
    write_manifest(tmp_path, replace_shards(write_documents(tmp_path / "other"), records))
    dataset = open_dataset([tmp_path], verify=False)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 100, limits[1]))
    try:
        found = [dataset[index]["sample_id"] for index in range(num_shards)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found == [row.sample_id for row in rows]


def replace_shards(manifest: Manifest, records: list[ShardRecord]) -> Manifest:
    """The manifest of a table with other shards."""
    return dataclasses.replace(manifest, shards=records)


def test_what_a_reader_keeps_is_bounded_by_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a wide batch a row is decoded when it is asked for: the same row."""
    write_documents(tmp_path / "documents")
    write_signals(tmp_path / "signals", [document(index) for index in range(2 * ROWS)])
    folders = [tmp_path / "documents", tmp_path / "signals"]
    whole = open_dataset(folders, split="train")
    expected = [whole[index] for index in range(2 * ROWS)]
    monkeypatch.setattr(open_table, "WIDE_BYTES", 100)
    monkeypatch.setattr(open_table, "CACHED_BYTES", 3000)
    dataset = open_dataset(folders, split="train")
    order = np.random.default_rng(0).permutation(2 * ROWS)
    for index in order.tolist():
        row = dataset[index]
        assert list(row) == list(expected[index])
        for name, values in row.items():
            np.testing.assert_array_equal(values, expected[index][name])
    for part in dataset._parts:
        kept = [batch.content.nbytes for batch in part._batches.values()]
        assert not any(batch.rows for batch in part._batches.values())
        assert len(kept) == 1 or sum(kept) <= 3000


def test_advice_on_a_damaged_table_is_what_mends_it(tmp_path: Path) -> None:
    manifest = write_documents(tmp_path)
    (tmp_path / manifest.shards[1].file).write_bytes(b"torn")
    with pytest.raises(StoreError) as caught:
        open_dataset([tmp_path])
    assert f"delete {tmp_path / 'manifest.json'} and run the recipe again" in str(caught.value)
