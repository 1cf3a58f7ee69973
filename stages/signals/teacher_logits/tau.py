"""The tau at which positions keep ``mean_k`` entries on average, found on the input's first rows.

The rows go through the stage's own work as ``top_k`` of the most entries that a position may have;
from these and the mass beyond them follows how many entries each tau keeps. That number falls as
tau grows, so the smallest tau of four digits that keeps at most ``mean_k`` is found by bisection.
Four digits move the mean by less than a thousandth, and last bits, which differ between machines,
all but never move them.

Dimensions: P = scored positions, K = the most entries of a position.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from schemas.distribution import STICK_LEVELS
from schemas.errors import ConfigError
from schemas.open_table import known_table
from schemas.scored_spans import SCORED
from schemas.storage.files import Folder
from schemas.storage.manifest import read_manifest
from schemas.storage.shards import read_verified
from schemas.tables.preference_pairs import PreferencePair
from schemas.tables.teacher_logits import TopKLogits
from stages.signals.scoring.encoding import in_head, num_entries
from stages.signals.teacher_logits.calibration import Calibration, keep_first, read_calibration
from stages.signals.teacher_logits.stage import (
    CALIBRATED_OVER,
    TeacherLogitsStage,
    ThresholdEncoding,
    TopKEncoding,
)
from stages.stage import Later, Rejected, StageContext

Score = Callable[[TeacherLogitsStage, pa.Table], Iterable[Any]]
# 0.000001, 0.000001001, .., 0.9999, 1: by number, as many as they are.
_TAUS = range(6 * 9000 + 1)


def with_tau(stage: TeacherLogitsStage, context: StageContext, score: Score) -> TeacherLogitsStage:
    """Return the stage with the tau of its table, which is found by ``score`` if it is not known.

    ``score`` is the work of any such stage on some rows of the input. Raises ConfigError where no
    tau keeps ``mean_k`` entries.
    """
    assert isinstance(stage.encoding, ThresholdEncoding)
    found = read_calibration(context.folder)
    if found is None:
        found = keep_first(context.folder, _calibrated(stage, context, score))
    context.notes["tau"] = found.tau
    known = {"tau": found.tau, "mean_k": None}
    return stage.model_copy(update={"encoding": stage.encoding.model_copy(update=known)})


def _calibrated(stage: TeacherLogitsStage, context: StageContext, score: Score) -> Calibration:
    assert isinstance(stage.encoding, ThresholdEncoding) and context.input_folder is not None
    most = stage.encoding.most(context.vocab_size)
    as_top_k = stage.model_copy(update={"encoding": TopKEncoding(kind="top_k", k=most)})
    rows = first_rows(context.input_folder)
    results = [] if rows is None else [*map(_made, score(as_top_k, rows))]
    kept = [row for row in results if isinstance(row, TopKLogits)]
    if not kept:
        why = Counter(row.reason for row in results if isinstance(row, Rejected)).most_common(1)
        because = f": {why[0][1]} x '{why[0][0]}'" if why else ""
        raise ConfigError(
            f"encoding.mean_k: none of the first {len(results)} rows of {context.input_folder} has "
            f"a scored position to find tau on{because}; give tau, or mend the input"
        )
    masses = Masses.of(kept)
    assert stage.mean_k is not None
    tau = tau_of(masses, stage.mean_k)
    return Calibration(
        tau=tau,
        mean_entries=float(f"{masses.mean_entries(tau):.4g}"),
        num_positions=len(masses.beyond_P),
        num_rows=len(kept),
    )


def _made(result: Any) -> Any:
    return result.make() if isinstance(result, Later) else result


def first_rows(folder: Folder) -> pa.Table | None:
    """Return the first rows of a finished table that come to ``CALIBRATED_OVER``; None: no rows.

    They are those of 4,096 scored positions or, where few tokens are scored, of 65,536 tokens.
    """
    manifest = read_manifest(folder)
    table = known_table(manifest, folder)
    parts: list[pa.Table] = []
    found = Counter[str]()
    for shard in manifest.shards:
        content = read_verified(folder / shard.file, shard.sha256)
        taken = 0
        for row in (row for batch in content.to_batches() for row in table.rows(batch)):
            if any(found[what] >= most for what, most in CALIBRATED_OVER.items()):
                break
            found.update(positions=_num_scored(row), tokens=row.num_tokens)
            taken += 1
        parts.append(content.slice(0, taken))
        if taken < content.num_rows:
            break
    return pa.concat_tables(parts) if found else None


def _num_scored(row: Any) -> int:
    if isinstance(row, PreferencePair):
        return len(row.chosen_ids_C) + len(row.rejected_ids_R)
    return int(row.num_positions if hasattr(row, SCORED) else row.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class Masses:
    """The largest probabilities of each position and the rest's, float64, of sum one or nearly."""

    top_PK: Tensor
    beyond_P: Tensor

    @classmethod
    def of(cls, rows: Sequence[TopKLogits]) -> "Masses":
        """Put the positions of all rows together."""
        top_PK = np.concatenate([row.logprobs_PK for row in rows]).astype(np.float64)
        beyond_P = np.concatenate([row.rest_logprobs_P for row in rows]).astype(np.float64)
        return cls(torch.from_numpy(np.exp(top_PK)), torch.from_numpy(np.exp(beyond_P)))

    def mean_entries(self, tau: float) -> float:
        """Return the mean number of entries that ``tau`` keeps of a position.

        That number is the same in each draw, but for entries after a fraction of the broken stick
        that is rounded to 1, which are not kept: their expectation is taken.
        """
        left_PK = self.beyond_P[:, None] + self.top_PK.flip(1).cumsum(1).flip(1)
        num_entries_P = num_entries(self.top_PK, left_PK, self.beyond_P, tau)
        in_head_PK = in_head(self.top_PK, left_PK, num_entries_P)
        fractions_PK = torch.where(in_head_PK & (left_PK > 0), self.top_PK / left_PK, 0.0)
        below = STICK_LEVELS[-2]
        goes_on_PK = 1.0 - ((fractions_PK - below) / (1.0 - below)).clamp(min=0.0, max=1.0)
        has_next_PK = torch.arange(left_PK.shape[1]) < num_entries_P[:, None] - 1
        num_more_P = torch.where(has_next_PK, goes_on_PK.cumprod(1), 0.0).sum(1)
        return float(1.0 + num_more_P.mean())


def tau_of(masses: Masses, mean_k: float) -> float:
    """Return the smallest tau of four digits that keeps at most ``mean_k`` entries on average.

    Raises ConfigError where even the smallest of all keeps fewer.
    """
    if (most := masses.mean_entries(_tau(0))) < mean_k:
        raise ConfigError(
            f"encoding.mean_k is {mean_k:g}, but the first {len(masses.beyond_P):,} positions have "
            f"at most {most:.4g} entries on average, as many are so sure and none has more than "
            f"{masses.top_PK.shape[1]}: lower mean_k or raise max_k"
        )
    return _tau(bisect_left(_TAUS, True, key=lambda n: masses.mean_entries(_tau(n)) <= mean_k))


def _tau(number: int) -> float:
    """Return a tau by its number in ``_TAUS``."""
    power, digits = divmod(number, 9000)
    return float(f"{1000 + digits}e{power - 9}")
