"""What tables of responses, and of their scores, say of a student of the experiment on preferences.

Dimensions: E = prompts, N = responses to each.
"""

from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.methods.preference_steps import ALIGNED, BETA, REFERENCE, START
from benchmarks.rewarded_grammar.grammar import NOTHING, reward
from schemas.dataset import open_dataset
from schemas.tables.episodes import split_candidates
from schemas.tables.prompted.responses import FINISH_REASONS
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.student.train.stage import TrainStage

Array = npt.NDArray[Any]
STOPPED = FINISH_REASONS.index("stop")
MAX_GRAD_NORM: float = TrainStage.model_fields["max_grad_norm"].default


def rewards_of(tokenizer: Any, asked: Path, answers: Path, num_responses: int) -> Array:
    """Return the true rewards [E, N] of responses; who said nothing has no row and earns -2."""
    by_id = {row["sample_id"]: row for row in rows_of(answers)}
    nothing = [NOTHING] * num_responses
    return np.array(
        [
            _earned(tokenizer, by_id[row["sample_id"]]) if row["sample_id"] in by_id else nothing
            for row in rows_of(asked)
        ]
    )


def _earned(tokenizer: Any, row: Mapping[str, Any]) -> list[float]:
    """Return what the responses of a row earn."""
    prompt = tokenizer.decode(row["prompt_ids_T"])
    parts = split_candidates(row["response_ids_A"], row["response_lengths_N"])
    return [
        reward(prompt, tokenizer.decode(ids_A, skip_special_tokens=True), finished=stopped)
        for ids_A, stopped in zip(parts, row["finish_reasons_N"] == STOPPED, strict=True)
    ]


def wins(rewards_EN: Array, others_EN: Array) -> Array:
    """Return by prompt [E] the share of all N x N comparisons won, a tie being half a win."""
    signs_ENN = np.sign(rewards_EN[:, :, None] - others_EN[:, None, :])
    shares_E: Array = (signs_ENN.mean(axis=(1, 2)) + 1) / 2
    return shares_E


def rows_of(table: Path) -> list[Mapping[str, Any]]:
    """Return all rows of a table by their ids, so that those of two tables stand side by side."""
    rows = open_dataset([table], split="train", verify=False)
    return sorted((rows[index] for index in range(len(rows))), key=itemgetter("sample_id"))


def training_of(student: Path) -> dict[str, float | None]:
    """Return what a training logged: share of steps whose gradient was cut, last mean advantage."""
    record = read_checkpoint(student)
    assert record is not None
    norms = np.array([entry["grad_norm"] for entry in record.history if "grad_norm" in entry])
    advantages = [entry["advantage"] for entry in record.history if "advantage" in entry]
    return {
        "cut": float((norms > MAX_GRAD_NORM).mean()),
        "advantage": advantages[-1] if advantages else None,
    }


def scores_of(folders: Mapping[str, Path], answers: str) -> dict[str, Any]:
    """Return the mean implicit reward, KL to SFT in nats a token, tokens, prompts answered."""
    own = rows_of(folders[answers])
    lengths_EN = np.array([row["response_lengths_N"] for row in own])
    own_E = np.array([row["logprobs_A"].sum(dtype=np.float64) for row in own])
    aligned_EN, reference_EN, start_EN = (
        np.array([row["response_logprobs_N"] for row in rows_of(folders[f"{answers}-{judge}"])],
                 np.float64)
        for judge in (ALIGNED, REFERENCE, START)
    )  # fmt: skip
    return {
        "implicit": float(BETA * (aligned_EN - reference_EN).mean()),
        "kl": float((own_E.sum() - start_EN.sum()) / lengths_EN.sum()),
        "tokens": float(lengths_EN.mean()),
        "answered": len(own),
    }
