"""Rows to batches: alignment, padding, decoding in workers, and what is refused.

Dimensions: B = rows, T = tokens, N = scored positions of a batch, P = of a row, K = kept entries.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from schemas.dataset import open_dataset
from schemas.distribution import unpack_threshold
from schemas.errors import StoreError
from stages.student.batches.signals import (
    IGNORED,
    Collator,
    SignalRows,
    encoding_of,
    worker_errors_as_raised,
)
from tests.fixtures.cached_data import VOCAB_SIZE, CachedData, make_cached_data

ENCODINGS = ("threshold", "threshold_tau", "top_k", "exact", "exact_int8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


def telling_row(sample_id: str, length: int, first_target: int, num_scored: int) -> dict[str, Any]:
    """A top-1 teacher that is sure of the true next token, so alignment can be read off."""
    ids_T = (np.arange(length) * 7 + len(sample_id)) % VOCAB_SIZE
    targets_P = ids_T[first_target : first_target + num_scored]
    return {
        "sample_id": sample_id,
        "input_ids_T": ids_T.astype(np.uint16),
        "first_target": first_target,
        "token_ids_PK": targets_P[:, None].astype(np.uint16),
        "logprobs_PK": np.zeros((num_scored, 1), np.float16),
        "rest_logprobs_P": np.full(num_scored, -np.inf, np.float16),
        "next_token_logprobs_P": np.zeros(num_scored, np.float16),
        "entropies_P": np.zeros(num_scored, np.float16),
    }


def test_entries_meet_the_hidden_state_that_predicts_them() -> None:
    """A toy model whose state at t is the token at t + 1 must be right at every position."""
    rows = [telling_row("a", 9, 1, 8), telling_row("bb", 5, 3, 2), telling_row("ccc", 7, 2, 3)]
    batch = Collator("top_k", VOCAB_SIZE)(rows)
    knows_next_BT = torch.roll(batch["input_ids"], shifts=-1, dims=1)
    state_N = knows_next_BT.flatten()[batch["positions_N"]]
    assert batch["positions_N"].tolist() == [*range(8), 9 + 2, 9 + 3, 18 + 1, 18 + 2, 18 + 3]
    torch.testing.assert_close(state_N, batch["next_token_ids_N"])
    torch.testing.assert_close(state_N, batch["token_ids_NK"][:, 0].long())


def test_labels_count_scored_tokens_and_padding_is_ignored() -> None:
    batch = Collator("top_k", VOCAB_SIZE)([telling_row("a", 9, 1, 8), telling_row("bb", 5, 3, 2)])
    labels_BT = batch["labels"]
    assert int((labels_BT[:, 1:] != IGNORED).sum()) == len(batch["positions_N"]) == 10
    assert labels_BT[1].tolist()[:3] == [IGNORED] * 3 and labels_BT[1].tolist()[5:] == [IGNORED] * 4


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_batch_is_its_rows(data: CachedData, encoding: str) -> None:
    """Decoding many rows at once gives what decoding each gives, in order."""
    dataset = open_dataset(data.tables(encoding), split="train")
    assert encoding_of(dataset) == encoding
    rows = [dataset[i] for i in (3, 0, 5)]  # the last has two tokens
    collate = Collator(encoding_of(dataset), VOCAB_SIZE)
    together, alone = collate(rows), [collate([row]) for row in rows]
    if encoding == "threshold_tau":  # K is the most of a batch, the others are the first id again
        width = together["weights_NK"].shape[1]
        assert len({batch["weights_NK"].shape[1] for batch in alone}) > 1
        for batch in alone:
            spare = (0, width - batch["weights_NK"].shape[1])
            ids_NK = batch["token_ids_NK"]
            first_NK = ids_NK[:, :1].expand(-1, spare[1])
            batch["token_ids_NK"] = torch.cat([ids_NK, first_NK], dim=1)
            batch["weights_NK"] = torch.nn.functional.pad(batch["weights_NK"], spare)
    for name in together:
        if name.endswith(("_N", "_NK", "_ND")) and name != "positions_N":
            torch.testing.assert_close(together[name], torch.cat([batch[name] for batch in alone]))
    if encoding == "threshold":
        expected = unpack_threshold(
            rows[0]["token_ids_PK"], rows[0]["num_head_P"], rows[0]["head_codes_E"]
        )
        np.testing.assert_array_equal(alone[0]["weights_NK"].numpy(), expected)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_workers_give_the_same_batches(data: CachedData, encoding: str) -> None:
    dataset = open_dataset(data.tables(encoding), split="train")
    collate = Collator(encoding_of(dataset), VOCAB_SIZE)
    rows = pickle.loads(pickle.dumps(SignalRows(dataset)))
    order = [5, 2, 9, 0, 1, 14]
    loaded = [
        list(DataLoader(rows, batch_size=2, sampler=order, collate_fn=collate, num_workers=workers))
        for workers in (0, 2)
    ]
    for here, there in zip(*loaded, strict=True):
        for name in here:
            torch.testing.assert_close(here[name], there[name])


def test_without_a_signal_table_every_token_but_the_first_is_scored(data: CachedData) -> None:
    dataset = open_dataset([data.documents], split="heldout")
    assert encoding_of(dataset) == ""
    row = dataset[0]
    batch = Collator("", VOCAB_SIZE)([row])
    assert batch["next_token_ids_N"].tolist() == row["input_ids_T"][1:].tolist()


def test_a_worker_says_what_it_refuses_in_one_line() -> None:
    row = telling_row("high", 5, 1, 4)
    row["input_ids_T"] = row["input_ids_T"] + np.uint16(VOCAB_SIZE)
    collate = Collator("top_k", VOCAB_SIZE)
    loader: Any = DataLoader([row], collate_fn=collate, num_workers=1)  # type: ignore[arg-type]
    with pytest.raises(StoreError) as caught, worker_errors_as_raised():
        next(iter(loader))
    assert str(caught.value).startswith("sample high: ") and "\n" not in str(caught.value)


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    row = telling_row("big", 5, 1, 4)
    row["token_ids_PK"] = row["token_ids_PK"] + np.uint16(VOCAB_SIZE)
    with pytest.raises(StoreError, match="sample big: token_ids_PK holds id"):
        Collator("top_k", VOCAB_SIZE)([row])


def test_sampled_ids_beyond_the_vocabulary_are_refused(data: CachedData) -> None:
    dataset = open_dataset(data.tables("threshold_tau"), split="train")
    row = dict(dataset[1])
    row["tail_gaps_high_E"] = row["tail_gaps_high_E"] + np.uint8(2)
    with pytest.raises(StoreError, match=f"sample {row['sample_id']}: token_ids_PK holds id"):
        Collator("threshold_tau", VOCAB_SIZE)([dict(dataset[0]), row])


def test_a_mass_that_is_not_one_is_refused() -> None:
    row = telling_row("half", 5, 1, 4)
    row["logprobs_PK"] = row["logprobs_PK"] - np.float16(0.7)
    with pytest.raises(StoreError, match=r"half.*mass of a position is 0\.496, not 1"):
        Collator("top_k", VOCAB_SIZE)([row])


def test_rows_are_joined_whatever_their_order(data: CachedData, tmp_path: Path) -> None:
    """The signal tables were written in another order than the documents."""
    dataset = open_dataset(data.tables("exact"), split="train")
    plain = open_dataset([data.documents], split="train")
    for index in range(len(dataset)):
        assert dataset[index]["sample_id"] == plain[index]["sample_id"]
        assert len(dataset[index]["hidden_PD"]) == len(plain[index]["input_ids_T"]) - 1
