"""Format ``axolotl``: rows with the columns of axolotl's knowledge distillation.

Columns and places are those that its collator and loss read (commit 067b021, ``integrations/kd``):
the loss shifts labels and not the teacher's columns, so entry t is about token t + 1. Its own
loader makes log-probs sum to one over the K tokens and so does every row that it trains on.

Dimensions: T = tokens of a row, K = kept tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.imports.parts import parts_of, shape_problem
from pipeline.imports.peer import Peer
from pipeline.imports.peer_files import PeerFile, array_of, require_columns
from pipeline.imports.peer_row import IMPOSSIBLE, PeerRow
from stages.sources.reading.rejects import MalformedRecord

COLUMNS = ("input_ids", "labels", "target_token_ids", "target_logprobs", "target_mask")
IGNORED = -100


class Axolotl(Peer):
    """Rows that its trainer takes as they are."""

    is_renormalised = True

    def __init__(self, folder: Path, files: list[PeerFile]) -> None:
        """Check the columns; raises ConfigError for one that is missing."""
        for file in files:
            require_columns(file, COLUMNS, "axolotl")

    def columns(self, schema: pa.Schema) -> list[str]:
        """Return the columns to read."""
        return [*COLUMNS, *({"attention_mask"} & set(schema.names))]

    def leaves_out(self, labels: list[npt.NDArray[Any]]) -> bool:
        """Whether some token after the first of a row has no label."""
        return any(bool((labels_T[1:] == IGNORED).any()) for labels_T in labels)

    def rows(self, record: Mapping[str, pa.Scalar]) -> list[PeerRow]:
        """Return the row; raises MalformedRecord where its columns contradict one another."""
        ids_T, labels_T = (array_of(record[name], name, np.int64) for name in COLUMNS[:2])
        ids_TK = array_of(record["target_token_ids"], "target_token_ids", np.int64)
        logprobs_TK = array_of(record["target_logprobs"], "target_logprobs", np.float64)
        mask_TK = array_of(record["target_mask"], "target_mask", np.int64) != 0
        if problem := shape_problem(ids_T, labels_T, ids_TK, logprobs_TK, mask_TK):
            raise MalformedRecord("columns of unequal lengths", problem)
        parts = parts_of(record, len(ids_T))
        if len(parts) != 1:
            raise MalformedRecord(
                "several texts in a row", f"attention_mask parts it in {len(parts)}, expected one"
            )
        (part,) = parts
        return [_row(*(each[part] for each in (ids_T, labels_T, ids_TK, logprobs_TK, mask_TK)))]


def _row(
    ids_T: npt.NDArray[Any],
    labels_T: npt.NDArray[Any],
    ids_TK: npt.NDArray[Any],
    logprobs_TK: npt.NDArray[Any],
    mask_TK: npt.NDArray[Any],
) -> PeerRow:
    is_scored_T = np.zeros(len(ids_T), bool)
    is_scored_T[: len(mask_TK)] = mask_TK.any(axis=1)
    is_labelled_T = labels_T != IGNORED
    if is_scored_T[-1] or (is_scored_T[:-1] != is_labelled_T[1:]).any():
        raise MalformedRecord(
            "target_mask contradicts labels",
            "target_mask has to be 1 at t where labels has the token t + 1, and nowhere else: the "
            "loss shifts labels and not the teacher's columns",
        )
    if (labels_T[1:] != ids_T[1:])[is_labelled_T[1:]].any():
        raise MalformedRecord("labels of other tokens", "a label is not the token at its place")
    places_P = np.flatnonzero(is_scored_T)
    logprobs_PK = np.where(mask_TK[places_P], logprobs_TK[places_P], -np.inf)
    masked_PK = ~mask_TK[places_P]
    if (logprobs_TK[places_P][masked_PK] > IMPOSSIBLE).any():
        raise MalformedRecord(
            "target_mask hides a log-prob", f"a masked log-prob is above {IMPOSSIBLE:g}"
        )
    return PeerRow(ids_T, places_P + 1, ids_TK[places_P], logprobs_PK)
