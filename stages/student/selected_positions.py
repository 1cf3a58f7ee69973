"""Training at some positions of each row: which they are, and a batch without the others.

Those of a user's spans, or those of largest entropy: SE-KD (arXiv 2602.01395, section 4). Of the P
scored positions of a row a loss is taken at the ``ceil(fraction * P)`` at which the student, or the
teacher, is least sure. We differ in two things. The student's entropies are those of one pass
before training, a table, where the paper's are of the student as it is at each step; with
``rounds`` they are made anew. And the loss is a mean over the step's selected positions, where the
paper's is one over rows of their own means: of rows of one length both are the same.

The whole row is run, as what is selected depends on the text before it. No head, no softmax and no
loss is computed elsewhere, cross-entropy included.

Dimensions: P = scored positions of a row, N = of a batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from schemas.errors import ConfigError, StoreError
from schemas.scored_spans import scored_targets, span_targets
from stages.stage import StageConfig

Row = Mapping[str, Any]
BoolArray = npt.NDArray[np.bool_]
ENTROPIES, MASKS = "token_entropies", "span_masks"
_ROUNDING = 1e-9  # of a product of a fraction and a count


class ByTeacherEntropy(StageConfig):
    """The share ``fraction`` of a row's positions at which the teacher is least sure."""

    by: Literal["teacher_entropy"]
    fraction: float = Field(default=0.2, gt=0.0, le=1.0)


class ByStudentEntropy(StageConfig):
    """The same by the student, as table ``token_entropies`` says."""

    by: Literal["student_entropy"]
    fraction: float = Field(default=0.2, gt=0.0, le=1.0)


class ByMask(StageConfig):
    """The positions whose tokens lie in the row's spans, as table ``span_masks`` says."""

    by: Literal["mask"]


Positions = Annotated[ByTeacherEntropy | ByStudentEntropy | ByMask, Field(discriminator="by")]
# The table that says which; the teacher's entropies are in its own.
TABLES = {"student_entropy": ENTROPIES, "mask": MASKS}


def largest(values_P: npt.NDArray[Any], fraction: float) -> BoolArray:
    """Return which ``ceil(fraction * P)`` values are the largest; of equal ones the earlier."""
    count = math.ceil(fraction * len(values_P) - _ROUNDING)
    order_P = np.argsort(-np.asarray(values_P, np.float64), kind="stable")
    is_among_P = np.zeros(len(values_P), np.bool_)
    is_among_P[order_P[:count]] = True
    return is_among_P


def selected(row: Row, positions: Positions) -> BoolArray:
    """Return which of a row's scored positions are trained at.

    Raises ConfigError where nobody knows the teacher's entropies, StoreError where the student's
    are of other positions than the teacher's.
    """
    if isinstance(positions, ByMask):
        return np.isin(scored_targets(row), span_targets(row["selected_S2"]))
    entropies_P = row["entropies_P"]
    if isinstance(positions, ByTeacherEntropy):
        if np.isnan(entropies_P).any():
            raise ConfigError(
                f"sample {row['sample_id']}: objective.positions is by teacher_entropy, and the "
                f"entropies of this teacher are not known, its rows were imported: select by "
                f"student_entropy, or score the text with stage teacher_logits"
            )
        return largest(entropies_P, positions.fraction)
    of_student_P = row["token_entropies_P"]
    if len(of_student_P) != len(entropies_P):
        raise StoreError(
            f"sample {row['sample_id']}: {ENTROPIES} has {len(of_student_P)} positions, its "
            f"teacher_logits {len(entropies_P)}: run `teachercache verify` on the data"
        )
    return largest(of_student_P, positions.fraction)


@dataclass(frozen=True, slots=True)
class AtSelected:
    """Make a batch of rows and leave out the positions that are not selected."""

    collate: Callable[[Sequence[Row]], dict[str, Any]]
    positions: Positions

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return one batch, every array with N in its name shorter and aligned as before."""
        batch = self.collate(rows)
        return without_others(batch, np.concatenate([selected(r, self.positions) for r in rows]))


def without_others(batch: dict[str, Any], keep_N: BoolArray) -> dict[str, Any]:
    """Return a batch whose positions are those of ``keep_N``; other labels are ignored ones."""
    import torch

    from stages.student.batches.signals import IGNORED  # loads torch

    kept_N = torch.from_numpy(keep_N)
    others = batch["positions_N"][~kept_N]
    batch["labels"].view(-1)[others + 1] = IGNORED
    aligned = [name for name in batch if name.endswith(("_N", "_NK", "_ND"))]
    return batch | {name: batch[name][kept_N] for name in aligned}
