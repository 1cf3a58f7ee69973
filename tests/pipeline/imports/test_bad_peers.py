"""Peers' rows that cannot be what they say: each costs itself alone, by reason, or the import."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.imports.import_tables import Imported, import_tables
from schemas.errors import ConfigError, StoreError, TeacherCacheError
from tests.fixtures.cached_data import VOCAB_SIZE, save_model

Row = dict[str, Any]
NAN = float("nan")
NUM_TOKENS, K = 6, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "teacher"
    save_model(folder, seed=1, num_layers=1)
    return folder


def axolotl(seed: int) -> Row:
    """A sound row with its last three tokens scored."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB_SIZE, NUM_TOKENS).tolist()
    scored = [0, 0, 1, 1, 1, 0]
    probs = -np.sort(-rng.dirichlet(np.ones(K), NUM_TOKENS), axis=1)
    return {
        "input_ids": ids,
        "attention_mask": [1] * NUM_TOKENS,
        "labels": [-100, -100, -100, *ids[3:]],
        "target_token_ids": [rng.permutation(VOCAB_SIZE)[:K].tolist() for _ in ids],
        "target_logprobs": np.log(probs).tolist(),
        "target_mask": [[mark] * K for mark in scored],
    }


def distillkit(seed: int) -> Row:
    """A sound row as it is captured: an entry less than tokens, mass outside the K."""
    row = axolotl(seed)
    values = np.array(row["target_logprobs"]) + np.log(0.9)
    return {
        "input_ids": row["input_ids"],
        "token_ids": row["target_token_ids"][:-1],
        "top_values": values[:-1].tolist(),
    }


def setting(*path: Any, to: Any) -> Callable[[Row], None]:
    """Return what sets one value of a row."""

    def change(row: Row) -> None:
        place: Any = row
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to(place[path[-1]]) if callable(to) else to

    return change


AXOLOTL: list[tuple[str, Callable[[Row], None], str]] = [
    ("an id above", setting("target_token_ids", 2, 1, to=VOCAB_SIZE), "ids outside the vocabulary"),
    ("an id below", setting("target_token_ids", 2, 1, to=-1), "ids outside the vocabulary"),
    ("a token above", setting("input_ids", 0, to=VOCAB_SIZE), "ids outside the vocabulary"),
    ("nan", setting("target_logprobs", 3, 0, to=NAN), "log-probs that are no number"),
    ("a log-prob above 0", setting("target_logprobs", 3, 0, to=0.5), "log-probs above 0"),
    ("infinite", setting("target_logprobs", 3, 0, to=float("inf")), "log-probs above 0"),
    ("above one", setting("target_logprobs", 3, to=[-0.1, -0.2, -0.3]), "sum above 1"),
    ("raw", setting("target_logprobs", 3, to=[-2.0, -3.0, -4.0]), "sum below 1"),
    ("no mass", setting("target_logprobs", 3, to=[-1e5] * K), "a position without mass"),
    ("unsorted", setting("target_logprobs", 3, to=lambda v: v[::-1]), "log-probs out of order"),
    ("a token twice", setting("target_token_ids", 3, to=lambda v: [v[0], v[1], v[0]]), "twice"),
    ("one entry less", setting("target_logprobs", 3, to=lambda v: v[:-1]), "unequal k"),
    ("k of another row", lambda row: _narrow(row), "unequal k"),
    ("null", setting("target_logprobs", 3, 0, to=None), "null values"),
    ("a null row", setting("labels", to=None), "null values"),
    ("mask without label", setting("target_mask", 1, to=[1] * K), "mask contradicts labels"),
    ("label without mask", setting("target_mask", 3, to=[0] * K), "mask contradicts labels"),
    ("mask at the end", setting("target_mask", 5, to=[1] * K), "mask contradicts labels"),
    ("mask of labels", lambda row: _unshifted(row), "mask contradicts labels"),
    ("mask over mass", setting("target_mask", 3, to=[1, 1, 0]), "target_mask hides a log-prob"),
    ("other label", setting("labels", 3, to=lambda v: (v + 1) % VOCAB_SIZE), "of other tokens"),
    ("short labels", setting("labels", to=lambda v: v[:-1]), "columns of unequal lengths"),
    ("long targets", setting("target_mask", to=lambda v: [*v, [0] * K]), "of unequal lengths"),
    ("two texts", setting("attention_mask", to=[1, 1, 1, 2, 2, 2]), "several texts in a row"),
    ("nothing scored", lambda row: _unscored(row), "no scored token"),
]


def _narrow(row: Row) -> None:
    for name in ("target_token_ids", "target_mask"):
        row[name] = [entry[:2] for entry in row[name]]
    row["target_logprobs"] = np.log([[0.6, 0.4]] * NUM_TOKENS).tolist()


def _unshifted(row: Row) -> None:
    row["target_mask"] = [[int(label != -100)] * K for label in row["labels"]]


def _unscored(row: Row) -> None:
    row["labels"], row["target_mask"] = [-100] * NUM_TOKENS, [[0] * K] * NUM_TOKENS


DISTILLKIT: list[tuple[str, Callable[[Row], None], str]] = [
    ("an id above", setting("token_ids", 0, 1, to=VOCAB_SIZE), "ids outside the vocabulary"),
    ("nan", setting("top_values", 4, 0, to=NAN), "log-probs that are no number"),
    ("above one", setting("top_values", 3, to=[-0.1, -0.2, -0.3]), "sum above 1"),
    ("unsorted", setting("top_values", 3, to=lambda v: v[::-1]), "log-probs out of order"),
    ("unset ids", setting("token_ids", 3, to=[7, 0, 0]), "a token twice at a position"),
    ("two entries less", lambda row: _shorter(row), "columns of unequal lengths"),
    ("values alone", setting("top_values", to=lambda v: v[:-1]), "columns of unequal lengths"),
    ("one token", setting("input_ids", to=lambda v: v[:1]), "columns of unequal lengths"),
    ("no entries", lambda row: _empty(row), "no scored token"),
]


def _shorter(row: Row) -> None:
    row["token_ids"], row["top_values"] = row["token_ids"][:-1], row["top_values"][:-1]


def _empty(row: Row) -> None:
    row["input_ids"], row["token_ids"], row["top_values"] = row["input_ids"][:1], [], []


def write(folder: Path, rows: list[Row], name: str = "data.parquet") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({key: [row[key] for row in rows] for key in rows[0]}), folder / name)


def load(folder: Path, model: Path, peer: str) -> Imported:
    root = folder.with_name("root")
    return import_tables(
        folder, root, peer=peer, tokenizer=model, teacher=None, heldout_fraction=0.0
    )


@pytest.mark.parametrize(
    ("peer", "change", "reason"),
    [
        pytest.param(peer, change, reason, id=f"{peer}: {what}")
        for peer, cases in (("axolotl", AXOLOTL), ("distillkit", DISTILLKIT))
        for what, change, reason in cases
    ],
)
def test_a_bad_row_costs_itself_alone_and_is_counted(
    model: Path, tmp_path: Path, peer: str, change: Callable[[Row], None], reason: str
) -> None:
    rows = [(axolotl if peer == "axolotl" else distillkit)(seed) for seed in range(3)]
    bad = copy.deepcopy(rows[1])
    change(bad)
    write(tmp_path / "peer", [rows[0], bad, rows[2]])
    made = load(tmp_path / "peer", model, peer)
    assert made.rows == {"train": 2, "heldout": 0}
    ((found, count),) = made.inputs_manifest.rejects.items()
    assert reason in found and count == 1
    (listed,) = (made.inputs / "source.rejects.jsonl").read_text().splitlines()
    assert json.loads(listed)["place"].endswith("data.parquet:1")


def test_a_token_of_probability_0_is_kept_with_none(model: Path, tmp_path: Path) -> None:
    row = axolotl(0)
    row["target_logprobs"][3] = [np.log(0.6), np.log(0.4), -1e4]
    row["target_mask"][3] = [1, 1, 0]
    write(tmp_path / "peer", [row])
    made = load(tmp_path / "peer", model, "axolotl")
    assert made.rows["train"] == 1 and not made.inputs_manifest.rejects


def one_row(**changes: Any) -> list[Row]:
    return [distillkit(0) | changes]


@pytest.mark.parametrize(
    ("peer", "rows", "words"),
    [
        ("onnx", one_row(), ("--from is 'onnx'", "axolotl, distillkit")),
        ("axolotl", one_row(), ("no column labels", "target_mask", "there are: input_ids")),
        ("distillkit", [axolotl(0)], ("no column token_ids", "top_values")),
        (
            "distillkit",
            one_row(packed_indices=[[1]], exact_values=[[0.5]], coeffs=[[0.5]]),
            ("older compressed form", "capture the rows again"),
        ),
        (
            "distillkit",
            one_row(bytepacked_indices=[[1]], compressed_logprobs=[[1]]),
            ("compression_config.yaml does not exist",),
        ),
        ("distillkit", one_row(input_ids="text"), ("column input_ids is string", "lists of")),
        (
            "distillkit",
            one_row(top_values=[[NAN] * K] * 5),
            ("no row could be imported: 1 x 'log-probs that are no number'", "data.parquet:0"),
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(
    model: Path, tmp_path: Path, peer: str, rows: list[Row], words: tuple[str, ...]
) -> None:
    write(tmp_path / "peer", rows)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "peer", model, peer)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_folder_that_is_none_or_torn_is_refused(model: Path, tmp_path: Path) -> None:
    def said() -> str:
        with pytest.raises(TeacherCacheError) as caught:
            load(tmp_path / "peer", model, "distillkit")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is not a folder" in said()
    (tmp_path / "peer").mkdir()
    assert "no *.parquet file" in said()
    write(tmp_path / "peer", [distillkit(0)], "train/a.parquet")
    write(tmp_path / "peer", [distillkit(1)])
    assert "data.parquet says of no split" in said()
    (tmp_path / "peer" / "data.parquet").unlink()
    torn = tmp_path / "peer" / "train" / "a.parquet"
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(StoreError, match=r"cannot read .*a\.parquet"):
        load(tmp_path / "peer", model, "distillkit")
    torn.unlink()
    (tmp_path / "peer" / "state.json").write_text("{}")
    assert "state.json" in said()


@pytest.mark.parametrize(
    ("text", "words"),
    [("d: 307\nk: many\n", "cannot read"), ("d: 9\nk: 2\nexact_k: 3\nresidual_bins: []", "k is 2")],
)
def test_settings_of_a_compression_that_cannot_be_are_refused(
    model: Path, tmp_path: Path, text: str, words: str
) -> None:
    write(tmp_path / "peer", one_row(bytepacked_indices=[[1]], compressed_logprobs=[[1]]))
    (tmp_path / "peer" / "compression_config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load(tmp_path / "peer", model, "distillkit")


def test_compressed_bytes_of_other_settings_are_counted(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "peer", one_row(bytepacked_indices=[[1]] * 5, compressed_logprobs=[[1]] * 5))
    settings = "d: 307\nk: 2\nexact_k: 2\nresidual_bins: []"
    (tmp_path / "peer" / "compression_config.yaml").write_text(settings)
    with pytest.raises(ConfigError, match=r"bytes of another length.* makes 3 and 8"):
        load(tmp_path / "peer", model, "distillkit")
