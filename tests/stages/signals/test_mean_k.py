"""Encoding ``threshold`` with ``mean_k``: the tau that is found, over which rows, and what refuses.

Dimensions: P = positions, V = vocabulary, K = the most entries of a position, R = repetitions.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigError, StoreError
from schemas.sample_id import sample_id_of
from schemas.storage.files import write_once
from schemas.storage.manifest import Manifest, write_manifest
from schemas.storage.records import ShardRecord, shard_name
from schemas.storage.shards import write_shard
from schemas.table import Table
from schemas.tables.conversations import CONVERSATIONS, Conversation
from schemas.tables.documents import DOCUMENTS
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from stages.models.spec import EngineOptions, ModelSpec
from stages.signals.scoring.encoding import measure
from stages.signals.scoring.states import Asked
from stages.signals.teacher_logits import tau as tau_search
from stages.signals.teacher_logits.calibration import (
    CALIBRATION,
    Calibration,
    keep_first,
    read_calibration,
)
from stages.signals.teacher_logits.encoder import RowEncoder
from stages.signals.teacher_logits.stage import TeacherLogitsStage, ThresholdEncoding
from stages.signals.teacher_logits.tau import Masses, first_rows, tau_of
from stages.stage import StageContext
from tests.fixtures.cached_data import VOCAB_SIZE, save_model
from tests.fixtures.preference_data import make_pairs
from tests.fixtures.tiny_teacher import as_document

pytestmark = pytest.mark.slow

Array = npt.NDArray[Any]
FOUND = Calibration(tau=0.0397, mean_entries=7.52, num_positions=4335, num_rows=17)


def mixed_probs(vocab_size: int = 900, num_positions: int = 60) -> Array:
    """Positions from nearly sure to nearly flat, float64 [P, V]."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits_PV = torch.randn(num_positions, vocab_size, generator=generator)
    logits_PV *= torch.linspace(0.2, 9.0, num_positions)[:, None]
    return np.asarray(logits_PV.double().softmax(-1).numpy())


def masses_of(probs_PV: Array, k: int) -> Masses:
    falling_PV = -np.sort(-probs_PV, axis=1)
    beyond_P = falling_PV[:, k:].sum(axis=1)
    return Masses(torch.from_numpy(falling_PV[:, :k].copy()), torch.from_numpy(beyond_P))


def stage_of(**encoding: Any) -> TeacherLogitsStage:
    settings = {"kind": "threshold", **encoding}
    body = {"stage": "teacher_logits", "input": "-", "model": "-", "encoding": settings}
    return TeacherLogitsStage.model_validate(body)


def expected_entries(probs_V: Array, tau: float, most: int) -> float:
    """Follow the definition by hand: heads one by one, and each chance that the stick ends there.

    The smallest k with own threshold at most tau is ``h + ceil(r / tau)``; level 62 of 63 is where
    a fraction may be rounded up to 1, after which nothing is kept.
    """
    falling_V = np.sort(probs_V)[::-1]
    num_sure = int((falling_V >= tau).sum())
    k = num_sure + int(np.ceil(falling_V[num_sure:].sum() / tau - 1e-6))
    k = min(max(k, 1), most)
    last_level = np.sin(np.pi * 62 / 126) ** 2
    goes_on, total, left = 1.0, 0.0, falling_V.sum()
    for entry in range(k):
        total += goes_on
        prob = falling_V[entry]
        if prob >= left / (k - entry) * (1 - 1e-5):  # else no later one is in the head either
            goes_on *= 1.0 - min(max((prob / left - last_level) / (1 - last_level), 0.0), 1.0)
            left = falling_V[entry + 1 :].sum()
        else:
            return total + goes_on * (k - entry - 1)
    return total


@pytest.mark.parametrize(("tau", "most"), [(0.3, 64), (0.04, 64), (0.013, 40), (0.0004, 64)])
def test_the_mean_is_that_of_the_definition(tau: float, most: int) -> None:
    probs_PV = mixed_probs()
    by_hand = np.mean([expected_entries(probs_V, tau, most) for probs_V in probs_PV])
    assert masses_of(probs_PV, most).mean_entries(tau) == pytest.approx(by_hand, rel=1e-9)


def test_the_mean_is_that_of_what_is_written() -> None:
    """60 rows of each position: the roundings that end a stick are drawn, the mean is not."""
    repeats, tau = 60, 0.05
    probs_PV = mixed_probs()
    logits_PV = torch.from_numpy(np.log(np.maximum(probs_PV, 1e-60))).float()
    next_P = torch.zeros(len(logits_PV), dtype=torch.int64)
    counts = []
    for key in range(repeats):
        asked = Asked(f"{key:024d}", 1, next_P.numpy())
        encoder = RowEncoder(stage_of(tau=tau), asked, logits_PV.shape[1])
        encoder.add(measure(logits_PV.clone(), next_P), torch.zeros(0), 0)
        row: Any = encoder.row()
        counts.append(row.num_head_P.astype(int) + row.num_tail_P)
    counts_RP = np.array(counts)
    error = counts_RP.mean(axis=1).std(ddof=1) / np.sqrt(repeats)
    mean = masses_of(probs_PV, 64).mean_entries(tau)
    assert 0 < error < 0.002 * mean  # some were drawn
    assert abs(counts_RP.mean() - mean) < 4 * error


@pytest.mark.parametrize("mean_k", [1.0, 1.5, 7.0, 12.0, 30.0])
def test_tau_is_the_smallest_of_four_digits_that_keeps_at_most_mean_k(mean_k: float) -> None:
    probs_PV = mixed_probs()
    tau = tau_of(masses_of(probs_PV, 64), mean_k)
    assert float(f"{tau:.4g}") == tau
    step = 10.0 ** np.floor(np.log10(tau * 0.99999)) / 1000

    def mean_at(tau: float) -> float:
        return float(np.mean([expected_entries(probs_V, tau, 64) for probs_V in probs_PV]))

    assert mean_at(tau) <= mean_k < mean_at(tau - step)


def test_taus_are_counted_in_four_digits_without_a_gap() -> None:
    taus = [tau_search._tau(number) for number in tau_search._TAUS]
    assert (taus[0], taus[-1], len(taus)) == (1e-6, 1.0, 54_001)
    assert [taus[n] for n in (8_999, 9_000, 9_001)] == [9.999e-6, 1e-5, 1.001e-5]
    assert all(low < high for low, high in pairwise(taus))


def test_what_no_tau_reaches_is_one_line() -> None:
    sure_PV = np.full((10, 50), 1e-9)
    sure_PV[:, 3] = 1.0 - 49e-9
    with pytest.raises(ConfigError, match="mean_k is 12, but the first 10 positions have at most"):
        tau_of(masses_of(sure_PV, 50), 12.0)
    few_PV = np.full((10, 5), 0.2)
    with pytest.raises(ConfigError, match="none has more than 5: lower mean_k or raise max_k"):
        tau_of(masses_of(few_PV, 5), 6.0)


def test_settings_name_one_rule_and_only_mean_k_moves_fingerprints() -> None:
    assert ThresholdEncoding(mean_k=12).model_dump() == {
        "kind": "threshold",
        "max_k": 64,
        "mean_k": 12.0,
    }
    for wrong, said in (
        ({"mean_k": 12, "k": 16}, "k is 16 beside tau, mean_k or max_k"),
        ({"mean_k": 12, "tau": 0.04}, "mean_k is 12 beside tau 0.04: mean_k finds its tau"),
        ({"mean_k": 12, "max_k": 10}, "mean_k is 12, above max_k 10"),
        ({"mean_k": 80}, "mean_k is 80, above max_k 64"),
        ({"mean_k": 0.5}, "greater than or equal to 1"),
        ({"mean_k": 12, "max_k": None}, "leave them out for their defaults"),
    ):
        with pytest.raises(ValidationError, match=said):
            ThresholdEncoding.model_validate(wrong)
    hashed = stage_of(mean_k=12).hashed()["config"]
    assert hashed["calibrated_over"] == {"positions": 4096, "tokens": 65536}
    assert "calibrated_over" not in stage_of(tau=0.04).hashed()["config"]
    assert stage_of(mean_k=12).side_files == (CALIBRATION,) and stage_of().side_files == ()


def test_bytes_are_foretold_from_mean_k() -> None:
    source = _manifest(DOCUMENTS, [], num_tokens=10_000)
    by_mean, by_tau = (
        stage_of(**rule).estimate(source, hidden_size=0) for rule in ({"mean_k": 12.5}, {})
    )
    assert by_mean == by_tau  # tau 0.04 is taken to keep 12.5
    assert stage_of(mean_k=25).estimate(source, hidden_size=0).num_bytes > by_mean.num_bytes


# The file beside the shards.


def test_the_first_to_write_is_what_all_are_given(tmp_path: Path) -> None:
    folder = tmp_path / "yet" / "to be made"
    assert read_calibration(folder) is None
    assert keep_first(folder, FOUND) == FOUND
    other = Calibration(tau=0.5, mean_entries=2.0, num_positions=1, num_rows=1)
    assert keep_first(folder, other) == FOUND == read_calibration(folder)
    assert [path.name for path in folder.iterdir()] == [CALIBRATION]


@pytest.mark.parametrize("links", [True, False])
def test_of_many_writers_at_once_one_is_first(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without hard links two may come first at once; here they come one after another."""

    def refuse(*paths: Path) -> None:
        raise PermissionError(1, "no hard links here")

    if not links:
        monkeypatch.setattr("os.link", refuse)
    texts = [f"writer {number}" * 200 for number in range(24)]
    with ThreadPoolExecutor(8 if links else 1) as pool:
        given = set(pool.map(lambda text: write_once(tmp_path / "file", text), texts))
    assert given == {(tmp_path / "file").read_bytes()} and len(list(tmp_path.iterdir())) == 1
    assert given.pop().decode() in texts


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"tau": 0.1}', "null"])
def test_a_damaged_file_is_one_line(tmp_path: Path, body: str) -> None:
    (tmp_path / CALIBRATION).write_text(body)
    with pytest.raises(StoreError, match=r"calibration\.json is damaged"):
        read_calibration(tmp_path)


# The rows that tau is found on.


def _manifest(table: Table[Any], shards: Sequence[ShardRecord], num_tokens: int = 0) -> Manifest:
    if num_tokens:
        shards = [
            ShardRecord(
                name="s",
                split="train",
                num_rows=1,
                num_tokens=num_tokens,
                num_positions=0,
                num_bytes=0,
                sha256="0" * 64,
            )
        ]
    return Manifest(
        table=table.name,
        version=table.version,
        variant=table.variant,
        fingerprint="0" * 64,
        tokenizer="",
        vocab_size=VOCAB_SIZE,
        identity={},
        shards=shards,
    )


def write_table(folder: Path, table: Table[Any], shards: Sequence[Sequence[Any]]) -> None:
    records = []
    for index, rows in enumerate(shards):
        name = shard_name(index, len(shards))
        file = write_shard(folder / f"{name}.arrow", table.bind(vocab_size=VOCAB_SIZE), rows)
        records.append(
            ShardRecord(
                name=name,
                split="train",
                num_rows=file.num_rows,
                num_tokens=sum(row.num_tokens for row in rows),
                num_positions=0,
                num_bytes=file.num_bytes,
                sha256=file.sha256,
            )
        )
    write_manifest(folder, _manifest(table, records))


def ids_of(num_tokens: int, first: int) -> Array:
    return (np.arange(num_tokens) + first) % VOCAB_SIZE


def chat_of(first: int, *, num_tokens: int, spans: list[list[int]]) -> Conversation:
    ids_T, scored_S2 = ids_of(num_tokens, first), np.array(spans)
    return Conversation(
        sample_id=sample_id_of(ids_T, scored_S2.ravel()),
        split="train",
        source_id="",
        input_ids_T=ids_T,
        scored_S2=scored_S2,
        is_cut=False,
    )


def test_they_are_whole_rows_in_the_tables_order_up_to_4096_scored_positions(
    tmp_path: Path,
) -> None:
    documents = [as_document(ids_of(501, first)) for first in range(14)]
    write_table(tmp_path, DOCUMENTS, [documents[:2], documents[2:7], [], documents[7:]])
    rows = first_rows(tmp_path)
    assert rows is not None
    expected = [document.sample_id for document in documents[:9]]  # 8 x 500 positions are too few
    assert rows["sample_id"].to_pylist() == expected


def test_where_little_is_scored_they_end_with_65536_tokens(tmp_path: Path) -> None:
    spans = [[1_000, 1_020]]
    chats = [chat_of(first, num_tokens=2_000, spans=spans) for first in range(40)]
    write_table(tmp_path, CONVERSATIONS, [chats])
    rows = first_rows(tmp_path)
    assert rows is not None and len(rows) == 33  # 32 x 2,000 tokens are too few


def test_of_pairs_the_responses_count_and_of_little_all_is_taken(tmp_path: Path) -> None:
    pairs = make_pairs()
    write_table(tmp_path, PREFERENCE_PAIRS, [pairs])
    rows = first_rows(tmp_path)
    assert rows is not None and rows["sample_id"].to_pylist() == [pair.sample_id for pair in pairs]
    pair = pairs[0]
    assert tau_search._num_scored(pair) == len(pair.chosen_ids_C) + len(pair.rejected_ids_R)


def test_a_damaged_input_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path, DOCUMENTS, [[as_document(ids_of(20, 0))]])
    (tmp_path / f"{shard_name(0, 1)}.arrow").write_bytes(b"torn")
    with pytest.raises(StoreError, match=r"input shard .* its manifest says"):
        first_rows(tmp_path)


# The stage, opened.


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It is sure at some positions and unsure at others; its window has 64 tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    save_model(folder, seed=1, num_layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data *= 4.0
    model.save_pretrained(folder)
    return folder


def context_of(teacher: Path, folder: Path, table: str) -> StageContext:
    return StageContext(
        folder=folder / "out",
        vocab_size=VOCAB_SIZE,
        models={"-": ModelSpec(teacher, "float32", "transformers", 32)},
        engine=EngineOptions(device="cpu", cache_dir=folder / "head_check"),
        input_table=table,
        input_folder=folder / "in",
    )


def short_chats() -> list[Conversation]:
    return [chat_of(7 * n, num_tokens=60, spans=[[5, 30], [40, 60]]) for n in range(40)]


def short_documents() -> list[Any]:
    rng = np.random.default_rng(4)
    return [as_document(rng.integers(0, VOCAB_SIZE, 40)) for _ in range(25)]


@pytest.mark.parametrize(
    ("table", "rows_of"),
    [(DOCUMENTS, short_documents), (CONVERSATIONS, short_chats), (PREFERENCE_PAIRS, make_pairs)],
    ids=["documents", "conversations", "pairs"],
)
def test_rows_of_each_input_have_the_mean_that_is_asked_for(
    teacher: Path, tmp_path: Path, table: Table[Any], rows_of: Callable[[], list[Any]]
) -> None:
    rows = rows_of()
    write_table(tmp_path / "in", table, [rows[:5], rows[5:]])
    shard = pa.Table.from_batches([table.bind(vocab_size=VOCAB_SIZE).to_batch(rows)])
    context = context_of(teacher, tmp_path, table.name)
    with stage_of(mean_k=6.5).open(context) as work:
        made: Any = list(work(shard))
    found = read_calibration(tmp_path / "out")
    assert found is not None and context.notes["tau"] == found.tau
    counts_P = np.concatenate([row.num_head_P.astype(int) + row.num_tail_P for row in made])
    assert (found.num_rows, found.num_positions) == (len(rows), len(counts_P))
    assert counts_P.std() > 1.5
    assert counts_P.mean() == pytest.approx(found.mean_entries, rel=0.005)
    assert counts_P.mean() == pytest.approx(6.5, rel=0.015)
    with stage_of(tau=found.tau).open(context_of(teacher, tmp_path, table.name)) as work:
        for row, named in zip(made, work(shard), strict=True):
            np.testing.assert_array_equal(row.head_ids_H, named.head_ids_H)


@pytest.mark.parametrize("length", [None, 2_000])
def test_an_input_without_a_scored_position_is_one_line(
    teacher: Path, tmp_path: Path, length: int | None
) -> None:
    rows = [] if length is None else [as_document(ids_of(length, first)) for first in range(3)]
    write_table(tmp_path / "in", DOCUMENTS, [rows])
    said = f"none of the first {len(rows)} rows of .* has a scored position"
    if length == 2_000:
        said += ".*: 3 x 'longer than the model's window"
    context = context_of(teacher, tmp_path, "documents")
    with pytest.raises(ConfigError, match=said), stage_of(mean_k=6.5).open(context):
        pass
    assert not (tmp_path / "out" / CALIBRATION).exists()
