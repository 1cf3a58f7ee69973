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
from schemas.dataset import open_dataset

Array = npt.NDArray[Any]


def wins(rewards_EN: Array, others_EN: Array) -> Array:
    """Return by prompt [E] the share of all N x N comparisons won, a tie being half a win."""
    signs_ENN = np.sign(rewards_EN[:, :, None] - others_EN[:, None, :])
    shares_E: Array = (signs_ENN.mean(axis=(1, 2)) + 1) / 2
    return shares_E


def rows_of(table: Path) -> list[Mapping[str, Any]]:
    """Return all rows of a table by their ids, so that those of two tables stand side by side."""
    rows = open_dataset([table], split="train", verify=False)
    return sorted((rows[index] for index in range(len(rows))), key=itemgetter("sample_id"))


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
