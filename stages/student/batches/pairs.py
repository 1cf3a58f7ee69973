"""Rows of preference pairs -> training batches for the objectives that read responses.

A pair becomes two sequences of one batch, prompt + chosen and prompt + rejected (of ADPA: the
student's own responses in the place of the rejected one), all chosen ones first, so one forward
serves both. Positions lie in the order of the sequences: the first ``num_chosen`` of N are of
chosen responses.

``weights_N`` is one over the tokens of a position's response (and over the number of responses to
its prompt), so sums of weighted positions are sums over samples of means over tokens.

Dimensions: N = scored positions of the batch, M = those after the first ``num_chosen``, K = kept
tokens (of ragged supports: the most of the batch), D and R = hidden widths of aligned teacher and
reference, B = samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from schemas.advantage_values import advantage_values
from schemas.dataset import CachedDataset
from schemas.errors import StoreError
from schemas.rounded_states import hidden_states
from schemas.tables.episodes import split_candidates
from stages.models.causal_lm.sequence_logprobs import Continuations
from stages.student.batches.signals import Collator, Row, check_ids, joined

Array = npt.NDArray[Any]
# Entries of all positions of a teacher's row, end to end, and the column that counts them.
_END_TO_END = {
    "head_codes_E": "num_head_P",
    "head_ids_H": "num_head_P",
    "head_codes_H": "num_head_P",
    "tail_gaps_low_E": "num_tail_P",
    "tail_gaps_high_E": "num_tail_P",
}


def chosen_row(row: Row) -> dict[str, Any]:
    """Return the chosen response as a row of its own, its teacher columns with it."""
    return _side(row, row["chosen_ids_C"], 0)


def rejected_row(row: Row) -> dict[str, Any]:
    """Return the rejected response, likewise."""
    return _side(row, row["rejected_ids_R"], len(row["chosen_ids_C"]))


def response_rows(row: Row) -> list[dict[str, Any]]:
    """Return the student's responses, each a row of its own without a teacher's columns."""
    responses = split_candidates(row["response_ids_A"], row["response_lengths_N"])
    return [_sequence(row, response) for response in responses]


def _sequence(row: Row, response_ids: Array) -> dict[str, Any]:
    prompt_T = row["prompt_ids_T"]
    return {
        "sample_id": row["sample_id"],
        "input_ids_T": np.concatenate([prompt_T, response_ids]),
        "first_target": len(prompt_T),
    }


def _side(row: Row, response_ids: Array, start: int) -> dict[str, Any]:
    """Cut a response's positions out of the teacher's columns, which hold both end to end."""
    side = _sequence(row, response_ids)
    if "next_token_logprobs_P" not in row:
        return side
    stop = start + len(response_ids)
    for name, values in row.items():
        if name.endswith(("_P", "_PK")):
            side[name] = values[start:stop]
    if "hidden_PD" in row or "hidden_codes_PD" in row:
        side["hidden_PD"] = hidden_states(row)[start:stop]
    for column, counts in _END_TO_END.items():
        if column in row:
            ends = np.cumsum([0, *row[counts]])
            side[column] = row[column][ends[start] : ends[stop]]
    return side


def _token_means(lengths: Sequence[int], shares: Sequence[float]) -> Tensor:
    weights_S = np.asarray(shares) / np.asarray(lengths)
    return torch.from_numpy(np.repeat(weights_S, lengths).astype(np.float32))


@dataclass(frozen=True, slots=True)
class ChosenCollator:
    """A batch of the chosen responses alone."""

    signals: Collator

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the batch that ``signals`` makes of them."""
        return {**self.signals([chosen_row(row) for row in rows])}


@dataclass(frozen=True, slots=True)
class DckdCollator:
    """Chosen and rejected responses with the teacher's distributions on both."""

    signals: Collator

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the batch; see the module."""
        sides = [*map(chosen_row, rows), *map(rejected_row, rows)]
        batch: dict[str, Any] = {**self.signals(sides)}
        lengths = [len(side["next_token_logprobs_P"]) for side in sides]
        return batch | {
            "num_chosen": sum(lengths[: len(rows)]),
            "num_samples": len(rows),
            "weights_N": _token_means(lengths, [1.0] * len(lengths)),
        }


@dataclass(frozen=True, slots=True)
class DpoCollator:
    """Prompts with both responses, and what the reference gives them [B, 2]."""

    vocab_size: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return ``answers`` (chosen, rejected) and ``reference_logprobs``."""
        for column in ("prompt_ids_T", "chosen_ids_C", "rejected_ids_R"):
            check_ids(rows, column, self.vocab_size)
        return {
            "answers": [_answers(row) for row in rows],
            "reference_logprobs": torch.from_numpy(reference_logprobs(rows)),
        }


def reference_logprobs(rows: Sequence[Row]) -> npt.NDArray[np.float32]:
    """Return [B, 2], chosen and rejected; raises StoreError where they are of other responses."""
    for row in rows:
        lengths = [len(row["chosen_ids_C"]), len(row["rejected_ids_R"])]
        if row["response_num_tokens_N"].tolist() != lengths:
            raise StoreError(
                f"sample {row['sample_id']}: reference log-probs of responses of "
                f"{row['response_num_tokens_N'].tolist()} tokens, the pair's have {lengths}: were "
                f"they made of the student's responses, and not of the pairs?"
            )
    return np.stack([row["response_logprobs_N"] for row in rows]).astype(np.float32)


def _answers(row: Row) -> Continuations:
    return Continuations.of(row["prompt_ids_T"], (row["chosen_ids_C"], row["rejected_ids_R"]))


@dataclass(frozen=True, slots=True)
class AdpaCollator:
    """Chosen responses, then the student's own with the advantages of the tokens that are kept.

    ``beta`` is that of the table; only its ``exact`` support leaves it to be applied. Entries on
    ids from ``num_token_ids`` on, which no token uses, are dropped: like any token that is not
    kept, they have advantage 0, or the rest's.
    """

    vocab_size: int
    beta: float
    num_token_ids: int | None = None

    @classmethod
    def of(
        cls, dataset: CachedDataset, vocab_size: int, num_token_ids: int | None = None
    ) -> "AdpaCollator":
        """Read beta off the manifest of the table of advantages."""
        (manifest,) = [m for m in dataset.manifests if m.table == "advantages"]
        return cls(vocab_size, float(manifest.identity["config"]["beta"]), num_token_ids)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the batch; see the module."""
        responses = [response_rows(row) for row in rows]
        sides = [*map(chosen_row, rows), *(side for own in responses for side in own)]
        batch: dict[str, Any] = {**Collator("", self.vocab_size)(sides)}
        lengths = [len(side["input_ids_T"]) - side["first_target"] for side in sides]
        shares = [*([1.0] * len(rows)), *(1.0 / len(own) for own in responses for _ in own)]
        num_chosen = sum(lengths[: len(rows)])
        for row, own in zip(rows, responses, strict=True):
            _check_positions(row, own)
        return batch | {
            "num_chosen": num_chosen,
            "num_samples": len(rows),
            "weights_N": _token_means(lengths, shares),
            "advantages": self._advantages(rows),
        }

    def _advantages(self, rows: Sequence[Row]) -> dict[str, Any]:
        if "teacher_hidden_PD" in rows[0]:
            columns = "teacher_hidden_PD", "reference_hidden_PR"
            hidden = [joined(rows, name, np.float32) for name in columns]
            states = zip(("teacher_hidden_MD", "reference_hidden_MR"), hidden, strict=True)
            return {"beta": self.beta, **{name: torch.from_numpy(h) for name, h in states}}
        found = [advantage_values(row) for row in rows]
        read = [
            {"sample_id": row["sample_id"], "token_ids": ids}
            for row, (ids, _, _) in zip(rows, found, strict=True)
        ]
        check_ids(read, "token_ids", self.vocab_size, self.num_token_ids)
        width = max(ids_PK.shape[1] for ids_PK, _, _ in found)
        ids_MK, values_MK = (
            np.concatenate([_widened(parts[index], width) for parts in found]) for index in (0, 1)
        )
        rest_M = np.concatenate([rest_P for _, _, rest_P in found])
        if self.num_token_ids is not None:
            is_padding_MK = ids_MK >= self.num_token_ids
            ids_MK[is_padding_MK] = 0
            values_MK[is_padding_MK] = 0.0
        return {
            "token_ids_MK": torch.from_numpy(ids_MK),
            "values_MK": torch.from_numpy(values_MK),
            "rest_M": torch.from_numpy(rest_M),
        }


def _check_positions(row: Row, responses: Sequence[Row]) -> None:
    scored, found = len(row["token_advantages_P"]), len(row["response_ids_A"])
    if scored != found or not responses:
        raise StoreError(
            f"sample {row['sample_id']}: advantages at {scored} positions, the responses have "
            f"{found} tokens: run `teachercache verify` on the data"
        )


def _widened(entries_PK: Array, width: int) -> Array:
    """Pad with zeros, which add nothing."""
    return np.pad(entries_PK, ((0, 0), (0, width - entries_PK.shape[1])))
