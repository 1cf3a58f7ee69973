"""Rows that axolotl and DistillKit are trained on become tables: the teacher's own numbers.

Neither trainer installs beside ours: ``distillkit_a61c2e7.json`` holds what DistillKit's own code
at that commit made and read back of random distributions.

Dimensions: T = tokens of a row, P = scored positions, K = kept tokens, V = vocabulary.
"""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from pipeline.cache.inspect_rows import inspect_rows
from pipeline.cache.verify import verify_folders
from pipeline.exports.export import export_tables
from pipeline.imports import tables as writing
from pipeline.imports.distillkit_codec import Codec
from pipeline.imports.import_tables import Imported, import_tables
from schemas.dataset import open_dataset
from schemas.errors import ConfigError
from schemas.scored_spans import span_targets
from schemas.storage.manifest import read_manifest
from schemas.storage.records import read_notes
from schemas.tables.conversations import CONVERSATIONS, Conversation
from schemas.tables.teacher_logits import TOP_K, TopKLogits
from stages.student.evaluate.positions import evaluate
from stages.student.objectives.kd import KdConfig
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train
from tests.fixtures.cached_data import VOCAB_SIZE, CachedData, K, make_cached_data, write_table
from tests.fixtures.tiny_recipe import teachercache

F64Array = npt.NDArray[np.float64]
GOLDEN = json.loads(Path(__file__).with_name("distillkit_a61c2e7.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def chats(data: CachedData) -> list[Path]:
    """Conversations with two spans each, and a ``top_k`` table about them."""
    rng = np.random.default_rng(5)
    rows, signals = [], []
    for index, length in enumerate((14, 9, 20, 14, 11, 17)):
        made = Conversation(
            sample_id="",
            split="heldout" if index % 3 == 2 else "train",
            source_id="",
            input_ids_T=rng.integers(0, VOCAB_SIZE, length),
            scored_S2=np.array([(2, 4), (6, length - index % 2)]),
            is_cut=False,
        )
        fields = {name: getattr(made, name) for name in Conversation.__slots__}
        row = Conversation(**fields | {"sample_id": made.hashed_id})
        num = len(span_targets(row.scored_S2))
        logprobs_PV = np.log(rng.dirichlet(np.full(VOCAB_SIZE, 0.05), num) + 1e-9)
        ids_PK = np.argsort(-logprobs_PV, axis=1)[:, :5]
        kept_PK = np.take_along_axis(logprobs_PV, ids_PK, 1)
        rows.append(row)
        signals.append(
            TopKLogits(
                sample_id=row.sample_id,
                first_target=2,
                token_ids_PK=ids_PK,
                logprobs_PK=kept_PK.astype(np.float16),
                rest_logprobs_P=np.log1p(-np.exp(kept_PK).sum(axis=1)).astype(np.float16),
                next_token_logprobs_P=np.full(num, -1, np.float16),
                entropies_P=np.ones(num, np.float16),
            )
        )
    splits = {row.sample_id: row.split for row in rows}
    inputs = CONVERSATIONS.bind(vocab_size=VOCAB_SIZE)
    write_table(data.root / "chats", inputs, rows, data.teacher)
    bound = TOP_K.bind(vocab_size=VOCAB_SIZE, sizes={"K": 5})
    write_table(data.root / "scores", bound, signals, data.teacher, splits=splits)
    return [data.root / "chats", data.root / "scores"]


def imported(data: CachedData, folder: Path, root: Path, peer: str, **more: Any) -> Imported:
    settings = {"teacher": None, "heldout_fraction": 0.0} | more
    return import_tables(folder, root, peer=peer, tokenizer=data.teacher, **settings)


def exported_rows(tables: list[Path], to: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    export_tables(tables, to, folder, split=None, k=None)
    opened = datasets.load_from_disk(str(folder))
    return {split: list(opened[split]) for split in opened}


def assert_verified(made: Imported) -> None:
    said = StringIO()
    assert verify_folders([made.inputs, made.signals], Console(file=said, width=1000)) == []


def rows_of(made: Imported, split: str) -> Iterator[dict[str, Any]]:
    dataset = open_dataset([made.inputs, made.signals], split=split)
    return (dataset[index] for index in range(len(dataset)))


@pytest.fixture(scope="module")
def logprobs_of(data: CachedData) -> Any:
    """The teacher's log-probs [T, V] of the token after each of a row, by a plain float64 pass."""
    model = LlamaForCausalLM.from_pretrained(data.teacher).double().eval()

    @torch.no_grad()
    def forward(input_ids: list[int]) -> F64Array:
        logits_TV = model(input_ids=torch.tensor([input_ids])).logits[0]
        return np.asarray(logits_TV.log_softmax(dim=-1).numpy())

    return forward


@pytest.mark.parametrize("kind", ["documents", "conversations"])
@pytest.mark.parametrize("peer", ["axolotl", "distillkit"])
def test_an_export_that_is_imported_is_exported_again_with_equal_columns(
    data: CachedData, chats: list[Path], tmp_path: Path, peer: str, kind: str
) -> None:
    """Within float16. DistillKit's form has no last token, so what is about it goes each time."""
    tables = data.tables("top_k") if kind == "documents" else chats
    first = exported_rows(tables, peer, tmp_path / "first")
    made = imported(data, tmp_path / "first", tmp_path / "root", peer)
    assert_verified(made)
    assert made.inputs == tmp_path / "root" / kind / made.inputs.name
    assert (
        made.inputs_manifest.num_tokens == made.signals_manifest.num_tokens or kind != "documents"
    )
    again = exported_rows([made.inputs, made.signals], peer, tmp_path / "again")
    assert list(first) == list(again)
    for split, rows in first.items():
        if peer == "distillkit":
            rows = [{name: each[:-1] for name, each in row.items()} for row in rows]
            rows = [row for row in rows if any(label >= 0 for label in row["labels"])]
        assert len(rows) == len(again[split]) > 0
        for before, after in zip(rows, again[split], strict=True):
            for name, column in before.items():
                if name in ("target_logprobs", "top_values"):
                    np.testing.assert_allclose(after[name], column, rtol=1e-3, atol=2e-3)
                else:
                    assert after[name] == column, name


def test_entries_are_the_teachers_at_the_token_that_they_are_about(
    data: CachedData, logprobs_of: Any, tmp_path: Path
) -> None:
    """As DistillKit captures: T ids, T - 1 entries, the first of them about the second token."""
    rows, whole = [], {}
    for document in (row for split in ("train", "heldout") for row in documents(data, split)):
        true_TV = logprobs_of(document)
        ids_EK = np.argsort(-true_TV[:-1], axis=1)[:, :K]
        values_EK = np.take_along_axis(true_TV[:-1], ids_EK, 1).astype(np.float32)
        rows.append({"input_ids": document, "token_ids": ids_EK, "top_values": values_EK})
        whole[tuple(document)] = true_TV
    write_parquet(tmp_path / "peer" / "data_0.parquet", rows)
    made = imported(data, tmp_path / "peer", tmp_path / "root", "distillkit", heldout_fraction=0.4)
    assert_verified(made)
    assert made.inputs_manifest.table == "documents" and sum(made.rows.values()) == len(rows)
    assert min(made.rows.values()) > 3
    num_next = num_positions = 0
    for row in (row for split in made.rows for row in rows_of(made, split)):
        ids = row["input_ids_T"].tolist()
        true_PV = whole[tuple(ids)][:-1]
        picked_PK = np.take_along_axis(true_PV, row["token_ids_PK"].astype(int), 1)
        np.testing.assert_allclose(row["logprobs_PK"], picked_PK, rtol=1e-3, atol=1e-6)
        rest_P = np.exp(row["rest_logprobs_P"].astype(float))
        np.testing.assert_allclose(rest_P, 1 - np.exp(picked_PK).sum(axis=1), atol=1e-3)
        next_P = true_PV[np.arange(len(true_PV)), ids[1:]]
        is_kept_P = next_P >= picked_PK[:, -1]
        told_P = row["next_token_logprobs_P"]
        assert np.isnan(row["entropies_P"]).all() and (np.isnan(told_P) == ~is_kept_P).all()
        np.testing.assert_allclose(told_P[is_kept_P], next_P[is_kept_P], rtol=1e-3, atol=1e-6)
        num_next, num_positions = num_next + int(is_kept_P.sum()), num_positions + len(told_P)
    assert made.next_token_share == pytest.approx(num_next / num_positions)


def documents(data: CachedData, split: str) -> Iterator[list[int]]:
    dataset = open_dataset([data.documents], split=split)
    return (dataset[index]["input_ids_T"].tolist() for index in range(len(dataset)))


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        name: [np.asarray(row[name]).tolist() if row[name] is not None else None for row in rows]
        for name in rows[0]
    }
    pq.write_table(pa.table(columns), file)


def test_a_renormalised_top_k_says_so_wherever_it_goes(data: CachedData, tmp_path: Path) -> None:
    """No mass outside is made up, and nothing is said of the whole vocabulary."""
    exported_rows(data.tables("top_k"), "axolotl", tmp_path / "first")
    made = imported(data, tmp_path / "first", tmp_path / "root", "axolotl", teacher="Llama, T = 1")
    config = read_manifest(made.signals).identity["config"]
    assert config["renormalised"] is True and config["teacher"] == "Llama, T = 1"
    assert config["from"] == "axolotl" and len(config["files"]) == 2
    schema = json.loads((made.signals / "schema.json").read_text())
    assert schema["settings"]["renormalised"] is True
    name = next(iter(made.signals_manifest.shards)).name
    notes = read_notes(made.signals, name)
    assert notes is not None and notes["notes"]["read_from"] == str(tmp_path / "first")
    for row in rows_of(made, "train"):
        assert np.isneginf(row["rest_logprobs_P"]).all()
        assert np.isnan(row["next_token_logprobs_P"]).all() and np.isnan(row["entropies_P"]).all()
        np.testing.assert_allclose(
            np.exp(row["logprobs_PK"].astype(float)).sum(axis=1), 1, atol=5e-3
        )
    assert any("none is recorded" in line for line in made.lines())
    written, _ = export_tables(
        [made.inputs, made.signals], "parquet", tmp_path / "out", split=None, k=None
    )
    assert "was dropped before these rows were imported" in written.lost
    assert "%" not in written.lost


@pytest.mark.parametrize("peer", ["axolotl", "distillkit"])
def test_a_student_trains_on_imported_tables(data: CachedData, tmp_path: Path, peer: str) -> None:
    exported_rows(data.tables("top_k"), peer, tmp_path / "first")
    made = imported(data, tmp_path / "first", tmp_path / "root", peer)
    tables = [made.inputs, made.signals]
    config = TrainConfig(
        max_steps=8, lr=3e-3, per_device_batch_size=4, objective=KdConfig(weight=0.5)
    )
    options = TrainOptions(num_workers=0, log_every=1)
    found = train(
        config, student=data.student, data=tables, output=tmp_path / "out", options=options
    )
    assert found.metrics["after"]["kl_to_teacher"] < found.metrics["before"]["kl_to_teacher"]
    assert "teacher_cross_entropy" not in evaluate(tmp_path / "out", tables, split="heldout")
    assert "NaN" not in (tmp_path / "out" / "metrics.json").read_text()
    shown = StringIO()
    inspect_rows(
        Console(file=shown, width=200),
        made.signals,
        first=0,
        count=1,
        positions=3,
        top=2,
        tokenizer=None,
        signals=None,
    )
    assert "unknown" in shown.getvalue() and "nan" not in shown.getvalue()


@pytest.mark.parametrize("case", GOLDEN, ids=[str(number) for number in range(len(GOLDEN))])
def test_compressed_distributions_are_what_distillkit_reads(case: dict[str, Any]) -> None:
    """To a step of ``exact_dtype`` (some of a fit in 16 bits): it computes in the parts' types."""
    codec = Codec.model_validate(case["config"])
    bytes_of = [
        np.frombuffer(bytes.fromhex(case[name]), np.uint8).reshape(len(case["ids"]), -1)
        for name in ("indices", "logprobs")
    ]
    ids_EK, logprobs_EK = codec.entries(*bytes_of)
    assert ids_EK.tolist() == case["ids"]
    step = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-20}[codec.exact_dtype]
    steps = 4 if codec.term_dtype == "float16" else 1
    np.testing.assert_allclose(logprobs_EK, case["decoded"], rtol=steps * step, atol=1e-6)


def compressed(row: dict[str, Any]) -> dict[str, Any]:
    """Ids packed to 9 bits, two exact values, and six differences to a scale, in 12 bits each."""
    bits = (np.asarray(row["token_ids"])[..., None] >> np.arange(8, -1, -1)) & 1
    ids_EB = np.packbits(bits.reshape(len(bits), -1).astype(np.uint8), axis=1)
    parts = []
    for values_K in np.asarray(row["top_values"], np.float64):
        scale = np.float32(np.abs(values_K[2:]).max() / 2**11)
        codes = np.clip(np.round(values_K[2:] / scale), -(2**11), 2**11 - 1).astype(int) + 2**11
        code_bits = (codes[:, None] >> np.arange(11, -1, -1)) & 1
        packed = np.packbits(code_bits.reshape(-1).astype(np.uint8)).tobytes()
        parts.append(values_K[:2].astype("<f4").tobytes() + scale.tobytes() + packed)
    values_EB = np.array([list(part) for part in parts])
    return {
        "input_ids": row["input_ids"],
        "bytepacked_indices": ids_EB,
        "compressed_logprobs": values_EB,
    }


SETTINGS = """
d: 307
k: 8
exact_k: 2
delta_encoding: false
residual_bins: [{scale_dtype: float32, element_bits: 12, num_elements: 6}]
"""


def capture(data: CachedData, split: str = "train") -> list[dict[str, Any]]:
    """Rows as DistillKit captures them, of the table's own distributions."""
    dataset = open_dataset(data.tables("top_k"), split=split)
    return [
        {
            "input_ids": row["input_ids_T"].tolist(),
            "token_ids": row["token_ids_PK"].tolist(),
            "top_values": row["logprobs_PK"].astype(np.float32).tolist(),
        }
        for row in (dataset[index] for index in range(len(dataset)))
    ]


def test_compressed_rows_and_raw_ones_make_one_table(data: CachedData, tmp_path: Path) -> None:
    rows = capture(data)
    write_parquet(tmp_path / "raw" / "data_0.parquet", rows)
    write_parquet(tmp_path / "packed" / "data_0.parquet", [compressed(row) for row in rows])
    (tmp_path / "packed" / "compression_config.yaml").write_text(SETTINGS)
    made = [
        imported(data, tmp_path / name, tmp_path / "root", "distillkit")
        for name in ("raw", "packed")
    ]
    assert made[0].signals != made[1].signals
    for each in made:
        assert_verified(each)
    for raw, packed in zip(*(rows_of(each, "train") for each in made), strict=True):
        assert raw["sample_id"] == packed["sample_id"]
        kept = [dict(zip(ids, values, strict=True)) for ids, values in entries(raw)]
        for (ids, values), wanted in zip(entries(packed), kept, strict=True):
            assert set(ids) == set(wanted)
            np.testing.assert_allclose(values, [wanted[i] for i in ids], atol=1e-2)


def test_positions_that_a_compression_lets_sum_above_one_are_divided_by_their_sum(
    data: CachedData, tmp_path: Path
) -> None:
    """A fitted curve does that now and then: a row is not lost for it, and the screen says so."""
    (row, *_) = capture(data)
    row["top_values"][2] = [*np.log([0.5, 0.3]), *np.log(np.full(6, 0.1))]
    write_parquet(tmp_path / "peer" / "data_0.parquet", [compressed(row)])
    (tmp_path / "peer" / "compression_config.yaml").write_text(SETTINGS)
    made = imported(data, tmp_path / "peer", tmp_path / "root", "distillkit")
    assert_verified(made)
    assert made.num_rescaled == 1 and any(
        "divided by their sum: 1" in each for each in made.lines()
    )
    (found,) = rows_of(made, "train")
    probs_K = np.exp(found["logprobs_PK"][2].astype(float))
    np.testing.assert_allclose(probs_K, np.array([0.5, 0.3] + 6 * [0.1]) / 1.4, rtol=5e-3)
    assert np.isneginf(found["rest_logprobs_P"][2]) or found["rest_logprobs_P"][2] < -20
    row["top_values"][2] = [-0.1, -0.1, *np.log(np.full(6, 0.1))]
    write_parquet(tmp_path / "peer" / "data_0.parquet", [compressed(row)])
    with pytest.raises(ConfigError, match="probabilities that sum above 1"):
        imported(data, tmp_path / "peer", tmp_path / "root", "distillkit")


def entries(row: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
    return list(zip(row["token_ids_PK"].tolist(), row["logprobs_PK"].tolist(), strict=True))


def test_texts_that_distillkit_packed_into_a_row_are_rows_of_their_own(
    data: CachedData, tmp_path: Path
) -> None:
    """Its packing drops each text's last token and numbers the texts in ``attention_mask``."""
    first, second = capture(data)[:2]
    cut = [
        {name: each[: len(row["token_ids"])] for name, each in row.items()}
        for row in (first, second)
    ]
    numbers = [number for number, row in enumerate(cut, 1) for _ in row["input_ids"]]
    joined = {name: cut[0][name] + cut[1][name] for name in first} | {"attention_mask": numbers}
    write_parquet(tmp_path / "peer" / "data_0.parquet", [joined])
    made = imported(data, tmp_path / "peer", tmp_path / "root", "distillkit")
    assert_verified(made)
    for row, wanted in zip(rows_of(made, "train"), cut, strict=True):
        assert row["input_ids_T"].tolist() == wanted["input_ids"]
        assert row["token_ids_PK"].tolist() == wanted["token_ids"][:-1]


def test_an_import_that_was_cut_off_is_made_anew_and_a_whole_one_is_found(
    data: CachedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "peer" / "data_0.parquet", capture(data))
    monkeypatch.setattr(writing, "ROWS_PER_SHARD", 4)
    whole = imported(data, tmp_path / "peer", tmp_path / "one", "distillkit", heldout_fraction=0.3)
    assert len(whole.inputs_manifest.shards) > 3
    with monkeypatch.context() as broken:
        broken.setattr(
            writing, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            imported(data, tmp_path / "peer", tmp_path / "two", "distillkit", heldout_fraction=0.3)
    made = imported(data, tmp_path / "peer", tmp_path / "two", "distillkit", heldout_fraction=0.3)
    assert_verified(made)
    assert made.signals_manifest.dataset_id == whole.signals_manifest.dataset_id
    files = [{file.name for file in each.signals.iterdir()} for each in (whole, made)]
    assert files[0] == files[1]
    found = imported(data, tmp_path / "peer", tmp_path / "two", "distillkit", heldout_fraction=0.3)
    assert found.next_token_share is None and found.rows == made.rows
    assert any("was there already" in line for line in found.lines())


def test_inputs_that_are_finished_stay_so_while_another_teacher_is_imported(
    data: CachedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are of no teacher: one table of inputs, a table of signals for what each was called."""
    write_parquet(tmp_path / "peer" / "data_0.parquet", capture(data))
    one = imported(data, tmp_path / "peer", tmp_path / "root", "distillkit", teacher="one")
    before = {file.name: file.read_bytes() for file in one.inputs.glob("*.arrow")}
    with monkeypatch.context() as broken:
        broken.setattr(writing, "write_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            imported(data, tmp_path / "peer", tmp_path / "root", "distillkit", teacher="two")
    assert_verified(one)
    two = imported(data, tmp_path / "peer", tmp_path / "root", "distillkit", teacher="two")
    assert two.inputs == one.inputs and two.signals != one.signals
    assert_verified(one)
    assert_verified(two)
    assert {file.name: file.read_bytes() for file in one.inputs.glob("*.arrow")} == before


def test_the_command_says_what_was_made_and_what_is_not_known(
    data: CachedData, tmp_path: Path
) -> None:
    rows = capture(data)
    write_parquet(tmp_path / "peer" / "train" / "a.parquet", [*rows, rows[0]])
    write_parquet(tmp_path / "peer" / "validation" / "a.parquet", capture(data, "heldout"))
    asked = ("--from", "distillkit", "--tokenizer", str(data.teacher))
    said = teachercache("import", str(tmp_path / "peer"), str(tmp_path / "root"), *asked)
    assert said.code == 0, said.err
    assert "rows: train 18, heldout 6" in said.out and "teacher: unknown" in said.out
    assert "rejected: 1 x equal to an earlier row" in said.out
    assert "not known: entropies" in said.out
    listed = list((tmp_path / "root").rglob("source.rejects.jsonl"))
    assert json.loads(listed[0].read_text())["place"].endswith("train/a.parquet:18")
    assert teachercache("verify", str(tmp_path / "root")).code == 0
    wrong = teachercache("import", str(tmp_path / "peer"), "s3://bucket/root", *asked)
    assert wrong.code == 2 and wrong.err.count("\n") == 1 and "on this machine" in wrong.err
