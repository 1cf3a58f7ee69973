"""Distributions exported as Parquet and as ``datasets``: the teacher's own, at their own tokens.

Dimensions: T = tokens of a row, P = scored positions, V = vocabulary, K = kept tokens.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.exports import export as exporting
from pipeline.exports import parquet_files
from pipeline.exports.export import export_tables
from schemas.dataset import open_dataset
from schemas.errors import ConfigError, SchemaMismatch, StoreError
from schemas.scored_spans import span_targets
from schemas.tables.conversations import CONVERSATIONS, Conversation
from schemas.tables.teacher_logits import TOP_K, TopKLogits
from tests.fixtures.cached_data import VOCAB_SIZE, CachedData, K, make_cached_data, write_table
from tests.fixtures.tiny_recipe import teachercache

F64Array = npt.NDArray[np.float64]
SPLITS = ("train", "heldout")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def logprobs_of(data: CachedData) -> Any:
    """The teacher's log-probs [T, V] of the token after each of a row, by a plain float64 pass."""
    model = LlamaForCausalLM.from_pretrained(data.teacher).double().eval()

    @torch.no_grad()
    def forward(input_ids: list[int]) -> F64Array:
        logits_TV = model(input_ids=torch.tensor([input_ids])).logits[0]
        return np.asarray(logits_TV.log_softmax(dim=-1).numpy())

    return forward


def parquet_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    files = sorted((folder / split).glob("part-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def dataset_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return list(datasets.load_from_disk(str(folder))[split])


READERS = {"parquet": parquet_rows, "datasets": dataset_rows}


@pytest.mark.parametrize("to", READERS)
@pytest.mark.parametrize(("encoding", "k"), [("top_k", None), ("top_k", 3), ("exact", 11)])
def test_entries_are_the_teachers_at_the_token_that_they_are_about(
    data: CachedData, logprobs_of: Any, tmp_path: Path, to: str, encoding: str, k: int | None
) -> None:
    folder = tmp_path / "out"
    written, num_missing = export_tables(data.tables(encoding), to, folder, split=None, k=k)
    assert num_missing == 0 and list(written.rows) == list(SPLITS)
    assert f"top {k or K}," in written.lost
    outside = []
    for split in SPLITS:
        rows = READERS[to](folder, split)
        documents = open_dataset([data.documents], split=split)
        assert len(rows) == len(documents) == written.rows[split]
        for index, row in enumerate(rows):
            ids = documents[index]["input_ids_T"].tolist()
            assert row["sample_id"] == documents[index]["sample_id"]
            assert row["input_ids"] == ids
            assert row["labels"] == [-100, *ids[1:]]
            assert row["target_positions"] == list(range(1, len(ids)))
            true_PV = logprobs_of(ids)[np.array(row["target_positions"]) - 1]
            ids_PK, kept_PK = np.array(row["top_k_ids"]), np.array(row["top_k_logprobs"])
            assert ids_PK.shape == kept_PK.shape == (len(ids) - 1, k or K)
            np.testing.assert_allclose(
                kept_PK, -np.sort(-true_PV, axis=1)[:, : k or K], rtol=1e-3, atol=5e-3
            )
            picked_PK = np.take_along_axis(true_PV, ids_PK, axis=1)
            np.testing.assert_allclose(kept_PK, picked_PK, rtol=1e-3, atol=5e-3)
            rest_P = 1 - np.exp(picked_PK).sum(axis=1)
            np.testing.assert_allclose(np.exp(row["rest_logprobs"]), rest_P, atol=5e-3)
            outside.extend(rest_P)
    said = re.search(r"([\d.]+)% of a distribution", written.lost)
    assert said and abs(float(said[1]) - 100 * np.mean(outside)) < 0.1


def test_columns_have_their_types(data: CachedData, tmp_path: Path) -> None:
    export_tables(data.tables("top_k"), "datasets", tmp_path / "out", split="heldout", k=None)
    opened = datasets.load_from_disk(str(tmp_path / "out"))
    assert list(opened) == ["heldout"]
    features = opened["heldout"].features
    assert features["input_ids"].feature.dtype == "int32"
    assert features["top_k_ids"].feature.feature.dtype == "int32"
    assert features["top_k_logprobs"].feature.feature.dtype == "float32"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dataset_dict.json",
        "heldout",
    ]


def test_spans_are_where_labels_and_entries_are(data: CachedData, tmp_path: Path) -> None:
    """Each entry's likeliest token is the scored one itself, so a shift by one shows."""
    rows, signals = [], []
    for length, spans in ((9, [(2, 4), (6, 9)]), (7, [(5, 6)])):
        ids_T, spans_S2 = (np.arange(length) * 7 + length) % VOCAB_SIZE, np.array(spans)
        row = Conversation(
            sample_id="",
            split="train",
            source_id="",
            input_ids_T=ids_T,
            scored_S2=spans_S2,
            is_cut=False,
        )
        row = Conversation(
            **{name: getattr(row, name) for name in Conversation.__slots__}
            | {"sample_id": row.hashed_id}
        )
        targets_P = span_targets(spans_S2)
        rows.append(row)
        signals.append(
            TopKLogits(
                sample_id=row.sample_id,
                first_target=int(targets_P[0]),
                token_ids_PK=ids_T[targets_P][:, None],
                logprobs_PK=np.zeros((len(targets_P), 1), np.float16),
                rest_logprobs_P=np.full(len(targets_P), -np.inf, np.float16),
                next_token_logprobs_P=np.zeros(len(targets_P), np.float16),
                entropies_P=np.zeros(len(targets_P), np.float16),
            )
        )
    splits = {row.sample_id: "train" for row in rows}
    chats, scores = tmp_path / "chats", tmp_path / "scores"
    write_table(chats, CONVERSATIONS.bind(vocab_size=VOCAB_SIZE), rows, data.teacher)
    bound = TOP_K.bind(vocab_size=VOCAB_SIZE, sizes={"K": 1})
    write_table(scores, bound, signals[:1], data.teacher, splits=splits)
    written, num_missing = export_tables(
        [chats, scores], "parquet", tmp_path / "out", split=None, k=None
    )
    (row_out,) = parquet_rows(tmp_path / "out", "train")
    assert written.rows == {"train": 1} and num_missing == 1
    ids = rows[0].input_ids_T.tolist()
    assert row_out["target_positions"] == [2, 3, 6, 7, 8]
    assert row_out["labels"] == [
        token if at in (2, 3, 6, 7, 8) else -100 for at, token in enumerate(ids)
    ]
    assert row_out["top_k_ids"] == [[ids[at]] for at in (2, 3, 6, 7, 8)]


@pytest.mark.parametrize("encoding", ["threshold", "threshold_tau"])
def test_sampled_distributions_keep_their_weights(
    data: CachedData, logprobs_of: Any, tmp_path: Path, encoding: str
) -> None:
    """Unbiased: over all positions, the mean weight of the likeliest token is its probability."""
    export_tables(data.tables(encoding), "parquet-sampled", tmp_path / "out", split=None, k=None)
    off = []
    for split in SPLITS:
        for row in parquet_rows(tmp_path / "out", split):
            weights = [np.array(weights_K) for weights_K in row["sampled_weights"]]
            np.testing.assert_allclose([each.sum() for each in weights], 1, atol=1e-5)
            true_PV = np.exp(logprobs_of(row["input_ids"]))[np.array(row["target_positions"]) - 1]
            for ids_K, weights_K, true_V in zip(row["sampled_ids"], weights, true_PV, strict=True):
                best = int(true_V.argmax())
                weight = sum(w for i, w in zip(ids_K, weights_K, strict=True) if i == best)
                off.append(weight - true_V[best])
    error = np.std(off) / np.sqrt(len(off))
    assert abs(np.mean(off)) < 4 * error + 1e-4


def test_files_are_cut_and_memory_is_bounded(
    data: CachedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row group and a file each of one record batch; together they are the same rows."""
    export_tables(data.tables("top_k"), "parquet", tmp_path / "one", split="train", k=None)
    monkeypatch.setattr(parquet_files, "ROW_GROUP_BYTES", 1)
    monkeypatch.setattr(parquet_files, "FILE_BYTES", 1)
    monkeypatch.setattr("pipeline.exports.list_columns.ROWS_PER_BATCH", 4)
    export_tables(data.tables("top_k"), "parquet", tmp_path / "many", split="train", k=None)
    assert len(list((tmp_path / "many" / "train").iterdir())) == 5
    assert parquet_rows(tmp_path / "many", "train") == parquet_rows(tmp_path / "one", "train")


@pytest.mark.parametrize(
    ("encoding", "to", "k", "words"),
    [
        ("threshold", "parquet", None, ("no top-k", "--to parquet-sampled", "top_k or exact")),
        ("threshold_tau", "parquet", None, ("no top-k", "--to parquet-sampled", "top_k or exact")),
        ("threshold", "datasets", 4, ("no top-k", "--to parquet-sampled", "top_k or exact")),
        ("threshold", "parquet-sampled", 4, ("leave --k out",)),
        ("top_k", "parquet-sampled", None, ("has top_k", "--to parquet")),
        ("top_k", "parquet", 9, ("--k is 9", "keeps 8 tokens", "at most 8")),
        ("exact", "parquet", 308, ("--k is 308", "307 tokens")),
        ("exact", "parquet", None, ("say how many", "--k 64")),
        (
            "top_k",
            "onnx",
            None,
            ("--to is 'onnx'", "parquet, parquet-sampled, datasets, trl-dpo, axolotl, distillkit"),
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused_in_one_line(
    data: CachedData, tmp_path: Path, encoding: str, to: str, k: int | None, words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        export_tables(data.tables(encoding), to, tmp_path / "out", split=None, k=k)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
    assert list(tmp_path.iterdir()) == []


def test_tables_that_do_not_belong_together_are_refused(data: CachedData, tmp_path: Path) -> None:
    for tables in ([data.documents], [data.root / "top_k"], [data.documents, data.documents]):
        with pytest.raises((ConfigError, SchemaMismatch)) as caught:
            export_tables(tables, "parquet", tmp_path / "out", split=None, k=None)
        assert "expected two" in str(caught.value) or "both have a column" in str(caught.value)


def test_a_finished_export_stays_and_an_unfinished_one_is_made_anew(
    data: CachedData, tmp_path: Path
) -> None:
    folder, left = tmp_path / "out", tmp_path / "out.unfinished"
    (left / "train").mkdir(parents=True)
    (left / "train" / "part-00007.parquet").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="is there, and no export made it"):
        export_tables(data.tables("top_k"), "parquet", folder, split=None, k=None)
    assert (left / "train" / "part-00007.parquet").read_bytes() == b"torn"
    (left / exporting._LOCK).touch()
    export_tables(data.tables("top_k"), "parquet", folder, split=None, k=None)
    assert not left.exists()
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert sorted(path.name for path in files) == ["part-00000.parquet"] * 2
    with pytest.raises(ConfigError, match="is there already"):
        export_tables(data.tables("top_k"), "parquet", folder, split=None, k=None)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


def test_two_exports_to_one_folder_are_kept_apart(data: CachedData, tmp_path: Path) -> None:
    with (
        exporting._work_folder(tmp_path / "out"),
        pytest.raises(StoreError, match="another export is writing"),
    ):
        export_tables(data.tables("top_k"), "parquet", tmp_path / "out", split=None, k=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_disk_that_refuses_is_one_line_and_leaves_no_export(
    data: CachedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def full(*_: object, **__: object) -> None:
        if next(calls):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
    with pytest.raises(StoreError, match=r"cannot write .*No space left on device"):
        export_tables(data.tables("top_k"), "parquet", tmp_path / "out", split=None, k=None)
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]


def test_the_command_says_what_was_written_and_what_is_lost(
    data: CachedData, tmp_path: Path
) -> None:
    places = [part for folder in data.tables("top_k") for part in ("--data", str(folder))]
    said = teachercache("export", str(tmp_path / "out"), *places, "--to", "parquet")
    assert said.code == 0, said.err
    assert "rows: train 18, heldout 6" in said.out and "outside the top 8" in said.out
    again = teachercache("export", str(tmp_path / "out"), *places, "--to", "parquet")
    assert again.code == 2 and again.err.count("\n") == 1 and "already" in again.err
    stored = teachercache("export", "s3://bucket/out", *places, "--to", "parquet")
    assert stored.code == 2 and "on this machine" in stored.err
    other = teachercache(
        "export", str(tmp_path / "x"), *places, "--to", "parquet", "--split", "dev"
    )
    assert other.code == 2 and "has train and heldout" in other.err
