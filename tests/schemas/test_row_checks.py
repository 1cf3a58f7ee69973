"""Faults planted in finished tables with checksums mended: ``verify`` and whoever reads find each.

Every kind of table, written as a broken writer would: the file's sha256 is that of its record.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from pipeline.cache.verify import verify_folders
from schemas.dataset import open_dataset
from schemas.distribution import split_gaps
from schemas.errors import StoreError
from schemas.rounded_states import in_steps
from schemas.row_checks import contradiction_in
from schemas.sample_id import id_spans, sample_id_of
from schemas.storage.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from schemas.storage.records import ShardRecord, shard_name
from schemas.storage.shards import write_shard
from schemas.tables import TABLES
from tests.fixtures.demonstration_data import cut
from tests.fixtures.episode_data import as_episode
from tests.fixtures.tiny_responses import make_pair

VOCAB, ROWS, FAULTY, P, K = 300, 20, 18, 5, 4  # row 18 lies in the second record batch
SIZES = {"K": K, "D": 3, "R": 3}
Values = dict[str, Any]


def some_row(name: str, variant: str, index: int) -> Values:
    """A sound row's columns, of any table."""
    rng = np.random.default_rng(index)
    key = sample_id_of(np.array([index]))
    fall_PK = -np.sort(rng.random((P, K)), axis=1) - 2
    rest_P = np.log(1 - np.exp(fall_PK).sum(axis=1))
    ids_PK = rng.permuted(np.tile(np.arange(VOCAB), (P, 1)), axis=1)[:, :K]
    low_E, high_E = split_gaps(np.sort(ids_PK[:, 2:], axis=1), np.ones((P, 2), bool))
    logits = {
        "sample_id": key,
        "first_target": 1,
        "next_token_logprobs_P": -rng.random(P),
        "entropies_P": rng.random(P),
    }
    advantages = {
        "sample_id": key,
        "token_advantages_P": rng.normal(size=P),
        "teacher_logprobs_N": -rng.random(2),
        "reference_logprobs_N": -rng.random(2),
    }
    kept = {"token_ids_PK": ids_PK, "advantages_PK": rng.normal(size=(P, K))}
    hidden_PD = rng.normal(size=(P, 3))
    codes_PD, beyond_E = in_steps(hidden_PD, 0.01)
    ids_T = np.array([index, 7, 8])
    aligned: Values = {
        "sample_id": sample_id_of(ids_T, [(1, 2), (2, 3), *id_spans(key)]),
        "split": "train",
        "source_id": key,
        "input_ids_T": ids_T,
        "scored_S2": np.array([[1, 2], [2, 3]]),
        "span_logprobs_S": np.array([-2.0, -1.0]),
        "span_bytes_S": np.array([3, 0]),
        "num_bytes": 5,
    }
    rows: dict[tuple[str, str], Values] = {
        ("aligned_spans", ""): aligned,
        ("aligned_spans", "entries"): {
            **aligned,
            "num_entries_S": np.array([2, 1]),
            "entry_ids_E": np.array([7, 9, 7]),
            "entry_logprobs_E": np.array([-0.5, -2.0, -1.0]),
        },
        ("documents", ""): {
            "sample_id": sample_id_of(ids_T), "split": "train", "input_ids_T": ids_T,
        },
        ("conversations", ""): {
            "sample_id": sample_id_of(ids_T, [(1, 2), (2, 3)]),
            "split": "train",
            "source_id": "",
            "input_ids_T": ids_T,
            "scored_S2": np.array([[1, 2], [2, 3]]),
            "is_cut": False,
        },
        ("subset_preferences", ""): {
            "sample_id": key,
            "subset_demonstrations_S": np.array([0, 1, 1]),
            "subset_sizes_N": np.array([2, 1]),
            "answer_logprobs_N": np.array([-2.0, -1.0]),
            "num_answer_tokens": 1,
            "ranks_N": np.array([2, 1]),
        },
        ("candidate_scores", ""): {
            "sample_id": key,
            "candidate_logprobs_N": np.array([-2.0, -1.0]),
            "candidate_num_tokens_N": np.array([2, 1]),
        },
        ("response_logprobs", ""): {
            "sample_id": key,
            "response_logprobs_N": np.array([-2.0, -1.0]),
            "response_num_tokens_N": np.array([2, 1]),
        },
        ("response_token_logprobs", ""): {
            "sample_id": key,
            "token_logprobs_A": np.array([-2.0, -1.0, -0.5]),
            "response_num_tokens_N": np.array([2, 1]),
        },
        ("responses", ""): {
            "sample_id": key,
            "prompt_ids_T": np.array([1, 2]),
            "response_ids_A": ids_PK[:, 0],
            "response_lengths_N": np.array([2, P - 2]),
            "finish_reasons_N": np.array([0, 1]),
            "logprobs_A": -rng.random(P),
            "top_ids_AK": ids_PK,
            "top_logprobs_AK": fall_PK,
        },
        ("span_masks", ""): {"sample_id": key, "selected_S2": np.array([[1, 2], [4, 6]])},
        ("token_entropies", ""): {"sample_id": key, "token_entropies_P": rng.random(P)},
        ("teacher_logits", "threshold"): {
            **logits,
            "token_ids_PK": ids_PK,
            "num_head_P": np.full(P, 2),
            "head_codes_E": rng.integers(0, 64, 2 * P),
        },
        ("teacher_logits", "threshold_tau"): {
            **logits,
            "num_head_P": np.full(P, 2),
            "num_tail_P": np.full(P, 2),
            "head_ids_H": ids_PK[:, :2].reshape(-1),
            "head_codes_H": rng.integers(0, 64, 2 * P),
            "tail_gaps_low_E": low_E,
            "tail_gaps_high_E": high_E,
        },
        ("teacher_logits", "top_k"): {
            **logits, "token_ids_PK": ids_PK, "logprobs_PK": fall_PK, "rest_logprobs_P": rest_P,
        },
        ("teacher_logits", "exact"): {**logits, "hidden_PD": hidden_PD},
        ("teacher_logits", "exact_int8"): {
            **logits,
            "hidden_codes_PD": codes_PD,
            "hidden_beyond_E": beyond_E,
            "hidden_step": 0.01,
            "rounding_kl": 1e-4,
        },
        ("advantages", "exact"): {
            **advantages, "teacher_hidden_PD": hidden_PD, "reference_hidden_PR": hidden_PD,
        },
        ("advantages", "threshold"): {**advantages, **kept, "log_inclusions_PK": fall_PK},
        ("advantages", "threshold_tau"): {
            **advantages,
            "num_entries_P": np.full(P, 2),
            "id_gaps_low_E": low_E,
            "id_gaps_high_E": high_E,
            "value_codes_E": rng.integers(0, 256, 2 * P),
            "rest_advantages_P": rng.normal(size=P),
        },
        ("advantages", "union_top_k"): {
            **advantages,
            "num_entries_P": np.full(P, 2),
            "token_ids_E": ids_PK[:, :2].reshape(-1),
            "advantages_E": rng.normal(size=2 * P),
            "rest_advantages_P": rng.normal(size=P),
        },
        ("advantages", "as_released"): {**advantages, **kept},
    }  # fmt: skip
    if name in ("episodes", "preference_pairs", "demonstrations"):
        row: Any = make_pair([index, 2], [3, 4], [5])
        if name != "preference_pairs":
            demos = [(0, 1, 2)]
            row = as_episode([index, 3, 9, 4, 5], demos, 3, [6], [[6], [7, 8]], 0)
        if name == "demonstrations":
            (row,) = cut("episodes", [row])
        return {column: getattr(row, column) for column in TABLES[name, ""].columns}
    return rows[name, variant]


@dataclass(frozen=True)
class Loose:
    """A row that nobody checks: what a broken writer hands over."""

    values: Values

    def __getattr__(self, name: str) -> Any:
        return self.values[name]


def write(folder: Path, name: str, variant: str, faults: Values) -> Path:
    """Write a finished table whose row 18 has other values; return its shard."""
    table = TABLES[name, variant]
    rows = [some_row(name, variant, index) for index in range(ROWS)]
    sound = [table.row(**{n: np.asarray(v) if n[-2:-1] == "_" else v for n, v in row.items()})
             for row in rows]  # fmt: skip
    rows[FAULTY] = rows[FAULTY] | faults
    bound = table.bind(vocab_size=VOCAB, sizes=SIZES)
    file = folder / f"{shard_name(0, 1)}.arrow"
    written = write_shard(file, bound, [Loose(row) for row in rows])
    record = ShardRecord(
        name=shard_name(0, 1),
        split="train",
        num_rows=written.num_rows,
        num_tokens=sum(row.num_tokens for row in sound),
        num_positions=sum(row.num_positions for row in sound),
        num_bytes=written.num_bytes,
        sha256=written.sha256,
    )
    manifest = Manifest(
        table=name,
        version=table.version,
        variant=variant,
        fingerprint="f",
        tokenizer="t",
        vocab_size=VOCAB,
        identity={},
        shards=(record,),
    )
    write_manifest(folder, manifest)
    return file


def plant_twice(column: str) -> Callable[[Values], Values]:
    """Put a position's first kept token in the place of another one of it too."""

    def planted(row: Values) -> Values:
        values = np.array(row[column])
        if values.ndim == 1:  # two entries of each position end to end
            values[5] = values[4]
        else:
            values[2, -1] = values[2, 0]
        return {column: values}

    return planted


def plant(column: str, value: float) -> Callable[[Values], Values]:
    """Put a number in the middle of one column."""

    def planted(row: Values) -> Values:
        values = np.array(row[column], np.float64 if isinstance(value, float) else None)
        values.reshape(-1)[values.size // 2] = value
        return {column: values if values.ndim else values.item()}

    return planted


def no_gap(row: Values) -> Values:
    """Repeat the first sampled id of position 2."""
    low_E, high_E = (np.array(row[name]) for name in ("tail_gaps_low_E", "tail_gaps_high_E"))
    low_E[5] = high_E[5] = 0
    return {"tail_gaps_low_E": low_E, "tail_gaps_high_E": high_E}


def no_id_gap(row: Values) -> Values:
    """Repeat the first kept id of position 2."""
    low_E, high_E = (np.array(row[name]) for name in ("id_gaps_low_E", "id_gaps_high_E"))
    low_E[5] = high_E[5] = 0
    return {"id_gaps_low_E": low_E, "id_gaps_high_E": high_E}


def no_entry(row: Values) -> Values:
    """Give the entries of the last position to the first."""
    counts_P = np.array([4, 2, 2, 2, 0])
    return {"num_head_P": counts_P, "num_tail_P": counts_P}


FAULTS: list[tuple[str, str, Callable[[Values], Values], str]] = [
    ("documents", "", plant("input_ids_T", 9), "sample_id does not name its token ids"),
    ("documents", "", plant("input_ids_T", VOCAB), "input_ids_T holds 300, expected 0 to 299"),
    ("documents", "", lambda row: {"split": "test"}, "split is 'test'"),
    ("documents", "", lambda row: {"split": "heldout"}, "is 'heldout' in a shard of 'train'"),
    ("documents", "", lambda row: {"input_ids_T": row["input_ids_T"][:1]}, "1 tokens, at least 2"),
    ("episodes", "", plant("input_ids_T", 11), "sample_id does not name its token ids"),
    ("episodes", "", plant("candidate_ids_C", 11), "sample_id does not name its token ids"),
    ("episodes", "", lambda row: {"query_start": 4}, "sample_id does not name its token ids"),
    ("episodes", "", lambda row: {"answer_start": 99}, "do not lie in order"),
    ("episodes", "", plant("candidate_lengths_N", 5), "candidate lengths"),
    ("episodes", "", lambda row: {"gold": 2}, "gold is 2 of 2"),
    ("conversations", "", plant("input_ids_T", 11), "sample_id does not name its token ids"),
    ("conversations", "", plant("scored_S2", 9), "do not lie in order within tokens 1 to 2"),
    ("conversations", "", lambda row: {"source_id": "0" * 24}, "sample_id does not name"),
    ("conversations", "", lambda row: {"source_id": "none"}, "source_id 'none' is no sample_id"),
    ("aligned_spans", "", plant("input_ids_T", 11), "sample_id does not name its token ids"),
    ("aligned_spans", "", plant("scored_S2", 9), "do not lie in order within tokens 1 to 2"),
    ("aligned_spans", "", plant("span_logprobs_S", 0.5), "span_logprobs_S holds 0.5"),
    ("aligned_spans", "", plant("span_logprobs_S", np.nan), "span_logprobs_S holds nan"),
    ("aligned_spans", "", plant("span_bytes_S", 9), "its spans hold 12 bytes of 5"),
    ("aligned_spans", "", lambda row: {"span_bytes_S": np.array([3])}, "and bytes are [1, 2]"),
    ("aligned_spans", "", lambda row: {"source_id": "none"}, "source_id 'none' is no sample_id"),
    ("aligned_spans", "", lambda row: {"source_id": "0" * 24}, "sample_id does not name"),
    ("aligned_spans", "entries", plant("entry_ids_E", VOCAB), "entry_ids_E holds 300"),
    ("aligned_spans", "entries", plant("entry_ids_E", 7), "id 7 is kept twice at one span"),
    ("aligned_spans", "entries", plant("num_entries_S", 2), "entries do not match their counts"),
    ("aligned_spans", "entries", plant("entry_logprobs_E", 0.5), "entry_logprobs_E holds 0.5"),
    ("demonstrations", "", plant("input_ids_T", 11), "sample_id does not name its token ids"),
    ("demonstrations", "", plant("distiller_ids_L", 11), "sample_id does not name its token ids"),
    ("demonstrations", "", plant("candidate_ids_C", 11), "sample_id does not name its token ids"),
    ("demonstrations", "", plant("distiller_ids_L", VOCAB), "distiller_ids_L holds 300"),
    (
        "demonstrations",
        "",
        lambda row: {"query_start": 2},
        "demonstrations end at [3], and (1",
    ),
    (
        "demonstrations",
        "",
        plant("demonstration_ends_M", 9),
        "demonstrations end at [9], and (1",
    ),
    ("demonstrations", "", plant("demonstration_ends_M", 0), "demonstration_ends_M holds 0"),
    ("demonstrations", "", plant("scored_S2", 5), "sample_id does not name its token ids"),
    ("demonstrations", "", plant("scored_S2", 99), "do not lie in order"),
    ("demonstrations", "", lambda row: {"source_id": "0" * 24}, "sample_id does not name"),
    ("demonstrations", "", lambda row: {"source_id": "none"}, "source_id 'none' is no sample_id"),
    ("demonstrations", "", lambda row: {"candidate_lengths_N": [2, 1]}, "does not name its token"),
    ("demonstrations", "", plant("candidate_lengths_N", 0), "candidate lengths"),
    ("demonstrations", "", lambda row: {"draw": -1}, "draw holds -1"),
    ("demonstrations", "", lambda row: {"num_distiller_demonstrations": 2}, "are seen of 1"),
    ("preference_pairs", "", plant("chosen_ids_C", 9), "sample_id does not name its token ids"),
    ("preference_pairs", "", plant("rejected_ids_R", VOCAB), "rejected_ids_R holds 300"),
    ("subset_preferences", "", plant("answer_logprobs_N", np.nan), "answer_logprobs_N holds nan"),
    ("subset_preferences", "", plant("answer_logprobs_N", 0.5), "answer_logprobs_N holds 0.5"),
    ("subset_preferences", "", plant("subset_demonstrations_S", -1), "holds -1, expected 0"),
    ("subset_preferences", "", plant("subset_sizes_N", 3), "subset sizes do not match"),
    ("subset_preferences", "", lambda row: {"ranks_N": np.array([1, 2])}, "ranks are not those"),
    ("candidate_scores", "", plant("candidate_logprobs_N", np.nan), "holds nan"),
    ("candidate_scores", "", plant("candidate_logprobs_N", -np.inf), "holds -inf"),
    ("candidate_scores", "", plant("candidate_num_tokens_N", 0), "holds 0, expected 1"),
    ("response_logprobs", "", plant("response_logprobs_N", 3.0), "holds 3"),
    ("response_logprobs", "", plant("response_num_tokens_N", 0), "holds 0, expected 1"),
    ("response_token_logprobs", "", plant("token_logprobs_A", 3.0), "holds 3"),
    ("response_token_logprobs", "", plant("response_num_tokens_N", 0), "holds 0, expected 1"),
    ("response_token_logprobs", "", plant("response_num_tokens_N", 9), "3 scores, responses of 11"),
    ("responses", "", plant("prompt_ids_T", VOCAB), "prompt_ids_T holds 300"),
    ("responses", "", plant("finish_reasons_N", 2), "finish_reasons_N holds 2, expected 0 to 1"),
    ("responses", "", plant("logprobs_A", np.nan), "logprobs_A holds nan"),
    ("responses", "", plant("top_logprobs_AK", -0.5), "top_logprobs_AK rises"),
    ("responses", "", plant("response_lengths_N", 9), "responses of [2, 9] tokens"),
    ("span_masks", "", lambda row: {"selected_S2": np.array([[3, 3]])}, "do not lie in order"),
    ("span_masks", "", lambda row: {"selected_S2": np.zeros((0, 2))}, "no span is selected"),
    ("token_entropies", "", plant("token_entropies_P", np.nan), "token_entropies_P holds nan"),
    ("token_entropies", "", plant("token_entropies_P", 6.5), "token_entropies_P holds 6.5"),
    ("token_entropies", "", plant("token_entropies_P", -0.5), "token_entropies_P holds -0.5"),
    (
        "token_entropies",
        "",
        lambda row: {"token_entropies_P": np.zeros(0)},
        "no position has an entropy",
    ),
    ("teacher_logits", "threshold", plant("head_codes_E", 200), "head_codes_E holds 200"),
    ("teacher_logits", "threshold", plant("num_head_P", 5), "num_head_P holds 5, expected 0 to 4"),
    ("teacher_logits", "threshold", plant("num_head_P", 1), "head codes do not match"),
    ("teacher_logits", "threshold", plant("token_ids_PK", VOCAB), "token_ids_PK holds 300"),
    ("teacher_logits", "threshold", plant("entropies_P", 6.5), "entropies_P holds 6.5"),
    ("teacher_logits", "threshold", plant("entropies_P", -0.5), "entropies_P holds -0.5"),
    ("teacher_logits", "threshold", plant("next_token_logprobs_P", 0.5), "holds 0.5"),
    ("teacher_logits", "threshold", lambda row: {"first_target": 0}, "first_target 0"),
    ("teacher_logits", "threshold", plant_twice("token_ids_PK"), "twice at one position"),
    ("teacher_logits", "threshold_tau", plant("head_codes_H", 64), "head_codes_H holds 64"),
    ("teacher_logits", "threshold_tau", plant("head_ids_H", VOCAB), "head_ids_H holds 300"),
    ("teacher_logits", "threshold_tau", plant_twice("head_ids_H"), "is kept twice at one position"),
    ("teacher_logits", "threshold_tau", plant("num_head_P", 1), "do not match their counts"),
    ("teacher_logits", "threshold_tau", plant("num_tail_P", 3), "do not match their counts"),
    ("teacher_logits", "threshold_tau", plant("tail_gaps_high_E", 2), "a sampled id is"),
    ("teacher_logits", "threshold_tau", no_gap, "is kept twice at one position"),
    ("teacher_logits", "threshold_tau", no_entry, "do not match their counts"),
    ("teacher_logits", "top_k", plant_twice("token_ids_PK"), "twice at one position"),
    ("teacher_logits", "top_k", plant("logprobs_PK", np.nan), "logprobs_PK holds nan"),
    ("teacher_logits", "top_k", plant("logprobs_PK", -0.5), "logprobs_PK rises"),
    ("teacher_logits", "top_k", plant("rest_logprobs_P", np.inf), "rest_logprobs_P holds inf"),
    ("teacher_logits", "top_k", plant("token_ids_PK", VOCAB), "token_ids_PK holds 300"),
    ("teacher_logits", "top_k", plant("entropies_P", np.nan), "stands for what is not known"),
    (
        "teacher_logits",
        "top_k",
        plant("next_token_logprobs_P", np.nan),
        "beside entropies that are",
    ),
    ("teacher_logits", "threshold", plant("entropies_P", np.nan), "entropies_P holds nan"),
    ("teacher_logits", "exact", plant("hidden_PD", np.nan), "hidden_PD holds nan"),
    ("teacher_logits", "exact_int8", plant("hidden_codes_PD", -128), "stand for a number beyond"),
    ("teacher_logits", "exact_int8", lambda row: {"hidden_step": -1.0}, "hidden_step holds -1"),
    ("teacher_logits", "exact_int8", lambda row: {"hidden_step": np.nan}, "hidden_step holds nan"),
    ("teacher_logits", "exact", plant("hidden_PD", -np.inf), "hidden_PD holds -inf"),
    ("teacher_logits", "exact", plant("next_token_logprobs_P", -np.nan), "holds nan"),
    ("advantages", "exact", plant("teacher_hidden_PD", np.nan), "teacher_hidden_PD holds nan"),
    ("advantages", "exact", plant("teacher_logprobs_N", 1.0), "teacher_logprobs_N holds 1"),
    ("advantages", "threshold", plant("advantages_PK", np.inf), "advantages_PK holds inf"),
    ("advantages", "threshold", plant("log_inclusions_PK", 0.5), "log_inclusions_PK holds 0.5"),
    ("advantages", "threshold", plant("token_ids_PK", VOCAB), "token_ids_PK holds 300"),
    ("responses", "", plant_twice("top_ids_AK"), "top_ids_AK holds id"),
    ("advantages", "threshold", plant_twice("token_ids_PK"), "twice at one position"),
    ("advantages", "as_released", plant_twice("token_ids_PK"), "twice at one position"),
    ("advantages", "threshold_tau", plant("num_entries_P", 3), "do not match their counts"),
    ("advantages", "threshold_tau", plant("id_gaps_high_E", 2), "a sampled id is"),
    ("advantages", "threshold_tau", no_id_gap, "is kept twice at one position"),
    ("advantages", "threshold_tau", plant("rest_advantages_P", np.nan), "holds nan"),
    ("advantages", "union_top_k", plant_twice("token_ids_E"), "twice at one position"),
    ("advantages", "union_top_k", plant("num_entries_P", 3), "11 entries are counted, not stored"),
    ("advantages", "union_top_k", plant("rest_advantages_P", np.nan), "holds nan"),
    ("advantages", "union_top_k", plant("token_ids_E", VOCAB), "token_ids_E holds 300"),
    ("advantages", "as_released", plant("token_advantages_P", np.nan), "holds nan"),
    ("advantages", "as_released", plant("reference_logprobs_N", -np.inf), "holds -inf"),
]


def said_by_verify(folder: Path) -> list[str]:
    with (folder / "said").open("w") as stream:
        return verify_folders([folder], Console(file=stream, width=1000))


def said_by_a_reader(folder: Path) -> str:
    """What ``train`` ends with: its rows come from here, whatever is made of them."""
    dataset = open_dataset([folder])
    with pytest.raises(StoreError) as caught:
        for index in range(len(dataset)):
            dataset[index]
    assert caught.value.exit_code == 1
    return str(caught.value)


@pytest.mark.parametrize(("name", "variant", "fault", "expected"), FAULTS)
def test_a_planted_fault_is_named_by_verify_and_by_the_reader(
    name: str, variant: str, fault: Callable[[Values], Values], expected: str, tmp_path: Path
) -> None:
    row = some_row(name, variant, FAULTY)
    file = write(tmp_path, name, variant, fault(row))
    (line,) = said_by_verify(tmp_path)
    for said in (line, said_by_a_reader(tmp_path)):
        assert said.startswith(f"{file} row {FAULTY} (sample {row['sample_id']}): ")
        assert expected in said and "\n" not in said
        assert f"delete this shard and the {MANIFEST} beside it and run the recipe again" in said


@pytest.mark.parametrize(("name", "variant"), TABLES)
def test_sound_rows_are_sound(name: str, variant: str, tmp_path: Path) -> None:
    """Every table has a fault above, too."""
    write(tmp_path, name, variant, {})
    assert said_by_verify(tmp_path) == []
    dataset = open_dataset([tmp_path])
    assert len([dataset[index] for index in range(len(dataset))]) == ROWS
    assert any((name, variant) == fault[:2] for fault in FAULTS)


@pytest.mark.parametrize("rows_a_batch", [8, 17, ROWS])
def test_record_batches_of_another_size_are_named(
    rows_a_batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is found by its place: of batches of 17 rows, row 16 would be read for row 17."""
    with monkeypatch.context() as patch:
        patch.setattr("schemas.storage.shards.ROWS_PER_BATCH", rows_a_batch)
        file = write(tmp_path, "documents", "", {})
    (line,) = said_by_verify(tmp_path)
    for said in (line, said_by_a_reader(tmp_path)):
        assert said.startswith(f"{file}: record batch 0 has {rows_a_batch} rows, expected 16")
    second = open_dataset([tmp_path])
    with pytest.raises(StoreError, match="record batch 1 has"):
        second[FAULTY]


def test_a_sample_of_two_rows_is_named_by_verify_and_where_tables_are_joined(
    tmp_path: Path,
) -> None:
    """Which of the two rows would be the sample's is chance."""
    twice = some_row("teacher_logits", "top_k", 3)["sample_id"]
    for name, variant in (("documents", ""), ("teacher_logits", "top_k")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, name, variant, {"sample_id": twice} if variant else {})
    (line,) = said_by_verify(tmp_path)
    assert line.endswith("has 1 repeated sample_ids")
    with pytest.raises(StoreError, match=f"1 sample_ids stand in several rows, {twice} is one"):
        open_dataset([tmp_path / "documents", tmp_path / "teacher_logits"])


def test_a_sample_of_two_shards_is_named_by_verify(tmp_path: Path) -> None:
    file = write(tmp_path, "documents", "", {})
    manifest = read_manifest(tmp_path)
    shards = tuple(replace(manifest.shards[0], name=shard_name(index, 2)) for index in range(2))
    for shard in shards:
        shutil.copy(file, tmp_path / shard.file)
    write_manifest(tmp_path, replace(manifest, shards=shards))
    (line,) = said_by_verify(tmp_path)
    assert f"{shards[1].file} has {ROWS} sample_ids of the shards before it, " in line


def test_a_mass_that_is_not_one_is_named_by_verify(tmp_path: Path) -> None:
    """Training finds it where the masses are added up: ``test_loader``."""
    low = {"rest_logprobs_P": np.full(P, -9.0)}
    write(tmp_path, "teacher_logits", "top_k", low)
    (line,) = said_by_verify(tmp_path)
    assert f"row {FAULTY}" in line and "the mass of a position is" in line


def test_torn_offsets_and_nulls_are_named() -> None:
    table = TABLES["documents", ""]
    bound = table.bind(vocab_size=VOCAB)
    batch = bound.to_batch([Loose(some_row("documents", "", index)) for index in range(3)])
    column = batch.column(2)
    offsets = pa.array([0, 7, 6, 9], pa.int32())
    torn = pa.ListArray.from_buffers(
        column.type, 3, [None, offsets.buffers()[1]], children=[column.values]
    )
    columns = {name: table.column_values(batch, name) for name in table.columns}
    broken = pa.RecordBatch.from_arrays([*batch.columns[:2], torn], schema=batch.schema)
    found = contradiction_in(broken, columns, table, VOCAB, "train")
    assert found is not None and "torn record batch" in found.problem
    split = pa.array(["train", None, "train"])
    nameless = pa.RecordBatch.from_arrays(
        [batch.column(0), split, batch.column(2)], names=batch.schema.names
    )
    found = contradiction_in(nameless, columns, table, VOCAB, "train")
    assert found is not None and found == (1, "split is null")
