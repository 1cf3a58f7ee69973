"""The held-out pairs that students are compared on, the same for all of them.

A row that a table of the judge's scores lacks (it was rejected there), or that does not fit every
model's window with room for an answer, is left out for all and counted.

Dimensions: T = tokens of a prompt, 2 = chosen and rejected, in this order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.dataset import CachedDataset, open_dataset
from schemas.errors import ConfigError, IdentityMismatch, StoreError
from schemas.storage.files import Folder
from schemas.storage.manifest import read_manifest
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from schemas.tables.prompted.response_logprobs import RESPONSE_LOGPROBS
from stages.models.causal_lm.language_head import max_positions, read_config
from stages.models.causal_lm.model import require_vocabulary, rows_needed
from stages.student.evaluate_preferences.stage import judge_tables_problem

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and two responses; ``judge_logprobs`` are cached sums of teacher and reference.

    Those are [2, 2], nats: (teacher, reference) by (chosen, rejected).
    """

    sample_id: str
    prompt_T: Array
    responses: tuple[Array, Array]
    finished: tuple[bool, bool]
    judge_logprobs: Array | None

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the two responses."""
        return len(self.responses[0]), len(self.responses[1])


@dataclass(frozen=True, slots=True)
class HeldOutPairs:
    """Pairs to measure on, and how many were left out for lack of a score, and for length."""

    pairs: tuple[Pair, ...]
    num_missing: int
    num_too_long: int

    @property
    def turn_ends(self) -> set[int]:
        """The tokens that end the data's own finished responses."""
        return {
            int(response[-1])
            for pair in self.pairs
            for response, finished in zip(pair.responses, pair.finished, strict=True)
            if finished
        }


def read_pairs(
    data: Sequence[Folder],
    *,
    split: str,
    models: Sequence[Path],
    max_tokens: int,
    has_judge: bool,
) -> HeldOutPairs:
    """Open the pairs and the judge's tables, and check that every model can read them.

    ``data`` is the pairs, then none or two tables: of the judge's teacher, then of its reference.
    Raises ConfigError for other tables, IdentityMismatch for a model of another tokenizer or too
    small a vocabulary, StoreError where no row is left.
    """
    pairs = open_dataset(data[:1], split=split)
    _expect_table(pairs, 0, PREFERENCE_PAIRS.name)
    if problem := judge_tables_problem(len(data) - 1, has_judge=has_judge):
        raise ConfigError(problem)
    for folder in models:
        _check_model(folder, pairs)
    cached = [_cached_logprobs(data[0], folder, split) for folder in data[1:]]
    if cached:
        _refuse_one_model(*data[1:])
    window = _window(models)
    kept: list[Pair] = []
    num_missing = 0
    for index in range(len(pairs)):
        row = pairs[index]
        if any(row["sample_id"] not in table for table in cached):
            num_missing += 1
            continue
        pair = _pair(row, [table[row["sample_id"]] for table in cached])
        if window is None or len(pair.prompt_T) + max(*pair.lengths, max_tokens) <= window:
            kept.append(pair)
    num_too_long = len(pairs) - num_missing - len(kept)
    if not kept:
        raise StoreError(
            f"{data[0]}: none of {len(pairs)} '{split}' pairs can be measured, {num_missing} have "
            f"no score of the judge and {num_too_long} do not fit a window of {window} tokens with "
            f"{max_tokens} to write: cut prompts shorter, or lower max_tokens"
        )
    return HeldOutPairs(tuple(kept), num_missing, num_too_long)


def _pair(row: dict[str, Any], judge_logprobs: Sequence[Array]) -> Pair:
    return Pair(
        sample_id=row["sample_id"],
        prompt_T=row["prompt_ids_T"],
        responses=(row["chosen_ids_C"], row["rejected_ids_R"]),
        finished=(bool(row["chosen_finished"]), bool(row["rejected_finished"])),
        judge_logprobs=np.stack(judge_logprobs).astype(np.float64) if judge_logprobs else None,
    )


def _cached_logprobs(pairs: Folder, folder: Folder, split: str) -> dict[str, Array]:
    """Return a table's sums [2] by sample_id; raises StoreError for scores of other responses."""
    dataset = open_dataset([pairs, folder], split=split)
    _expect_table(dataset, 1, RESPONSE_LOGPROBS.name)
    found: dict[str, Array] = {}
    for index in range(len(dataset)):
        row = dataset[index]
        lengths = [len(row["chosen_ids_C"]), len(row["rejected_ids_R"])]
        if row["response_num_tokens_N"].tolist() != lengths:
            raise StoreError(
                f"sample {row['sample_id']}: {folder} has scores of responses of "
                f"{row['response_num_tokens_N'].tolist()} tokens, the pair's have {lengths}: make "
                f"it with these pairs as input"
            )
        found[row["sample_id"]] = row["response_logprobs_N"]
    return found


def _refuse_one_model(teachers: Folder, references: Folder) -> None:
    if read_manifest(teachers).fingerprint == read_manifest(references).fingerprint:
        raise ConfigError(
            f"{teachers} and {references} hold one model's scores, so every reward would be 0: "
            f"give those of the judge's teacher, then those of its reference"
        )


def _expect_table(dataset: CachedDataset, place: int, table: str) -> None:
    found = dataset.manifests[place].table
    if found != table:
        where = "first" if place == 0 else "after the pairs"
        raise ConfigError(f"{dataset.folders[place]} is table {found}, expected {table} {where}")


def _check_model(folder: Path, pairs: CachedDataset) -> None:
    advice = "all models that are compared share the pairs' tokenizer"
    require_vocabulary("model", folder, pairs, advice)
    num_logits = int(read_config(folder).get_text_config().vocab_size)
    if num_logits < (needed := rows_needed(folder, pairs)):
        raise IdentityMismatch(
            f"model {folder} has a vocabulary of {num_logits}, the pairs' ids need {needed}: use a "
            f"model with at least as many embedding rows"
        )


def _window(models: Sequence[Path]) -> int | None:
    """Return the tokens that fit every model, None where none of them says."""
    configs = [read_config(folder).get_text_config() for folder in models]
    found = [max_positions(config) for config in configs]
    return min((size for size in found if size is not None), default=None)
