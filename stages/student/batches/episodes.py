"""Rows of episodes -> training batches for the objectives that score answers.

Sequences of subsets and candidates are of many lengths and stay numpy arrays in the batch:
``sequence_logprobs`` sorts, shares and pads them. Token ids are checked here, once.

Dimensions: T = tokens of a row, N = subsets or candidates of a sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from schemas.dataset import CachedDataset
from schemas.errors import StoreError
from schemas.tables.episodes import subset_input_ids
from schemas.tables.subset_preferences import split_subsets
from stages.models.causal_lm.sequence_logprobs import Continuations
from stages.student.batches.signals import Collator, Row, check_ids


def answers_of(row: Row) -> Continuations:
    """Return the prompt of an ``episodes`` row with all its candidates, or else with its answer."""
    prompt_T, answer_T = np.split(row["input_ids_T"], [row["answer_start"]])
    if len(row["candidate_lengths_N"]):
        return Continuations(prompt_T, row["candidate_ids_C"], row["candidate_lengths_N"])
    return Continuations(prompt_T, answer_T, np.array([len(answer_T)]))


def subsets_of(row: Row) -> list[Continuations]:
    """Return each subset's prompt with the answer; ``row`` has ``subset_preferences`` too."""
    num_answer = len(row["input_ids_T"]) - row["answer_start"]
    spans = (row["input_ids_T"], row["demonstrations_M3"], row["query_start"])
    subsets = split_subsets(row["subset_demonstrations_S"], row["subset_sizes_N"])
    if row["num_answer_tokens"] != num_answer or max(map(_largest, subsets)) >= len(spans[1]):
        raise StoreError(
            f"sample {row['sample_id']}: preferences of subsets {subsets} with "
            f"{row['num_answer_tokens']} answer tokens, the episode has {len(spans[1])} "
            f"demonstrations and {num_answer}: run `teachercache verify` on the data"
        )
    sequences = [subset_input_ids(*spans, kept) for kept in subsets]
    lengths_N = np.array([num_answer])
    return [
        Continuations(ids_T[:-num_answer], ids_T[-num_answer:], lengths_N) for ids_T in sequences
    ]


def _largest(kept: Sequence[int]) -> int:
    return max(kept, default=-1)


@dataclass(frozen=True, slots=True)
class BiAlignCollator:
    """A batch of ``signals`` over whole episodes, and ``subsets`` and ``ranks`` of each."""

    signals: Collator

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the batch; ``subsets`` lies end to end, ``ranks`` has one tensor a sample."""
        batch: dict[str, Any] = {**self.signals(rows)}
        batch["subsets"] = [subset for row in rows for subset in subsets_of(row)]
        batch["ranks"] = [torch.from_numpy(row["ranks_N"].astype(np.int64)) for row in rows]
        return batch


class EpisodesWithText(Dataset[tuple[Row, Row | None]]):
    """Episode i with a row of running text (None without): map-style and picklable.

    Texts are dealt in an order fixed by ``seed`` and dealt again when they run out, so an episode
    meets the same text in every epoch.
    """

    def __init__(self, episodes: CachedDataset, texts: CachedDataset | None, *, seed: int) -> None:
        """Wrap opened data sets; workers reopen their files."""
        self.episodes, self.texts = episodes, texts
        num_texts = len(texts) if texts is not None else 0
        self._order = np.random.default_rng(seed).permutation(num_texts)

    def __len__(self) -> int:
        """The number of episodes."""
        return len(self.episodes)

    def __getitem__(self, index: int) -> tuple[Row, Row | None]:
        """Return the columns of both rows as stored."""
        if self.texts is None:
            return self.episodes[index], None
        return self.episodes[index], self.texts[int(self._order[index % len(self._order)])]


@dataclass(frozen=True, slots=True)
class IclCollator:
    """Answers to score and what is known of them; ``text`` collates the running text, if any."""

    vocab_size: int
    text: Collator | None

    def __call__(self, pairs: Sequence[tuple[Row, Row | None]]) -> dict[str, Any]:
        """Return lists with one entry an episode, and ``lm``, a batch of ``text``."""
        rows = [row for row, _ in pairs]
        for column in ("input_ids_T", "candidate_ids_C"):
            check_ids(rows, column, self.vocab_size)
        answers = [answers_of(row) for row in rows]
        batch: dict[str, Any] = {
            "answers": answers,
            "num_tokens": [torch.from_numpy(np.asarray(a.lengths_N, np.int64)) for a in answers],
            "gold": [row["gold"] for row in rows],
        }
        if "candidate_logprobs_N" in rows[0]:
            batch["teacher_logprobs"] = [torch.from_numpy(_teacher_scores(row)) for row in rows]
        if self.text is not None:
            batch["lm"] = self.text([text for _, text in pairs if text is not None])
        return batch


def _teacher_scores(row: Mapping[str, Any]) -> Any:
    """Return [N] float32 log-probs of ``answers_of``; raises StoreError for those of others."""
    lengths_N = answers_of(row).lengths_N
    if row["candidate_num_tokens_N"].tolist() != lengths_N.tolist():
        raise StoreError(
            f"sample {row['sample_id']}: scores of candidates of {row['candidate_num_tokens_N']} "
            f"tokens, the episode's have {lengths_N}: run `teachercache verify`"
        )
    return row["candidate_logprobs_N"].astype(np.float32)
