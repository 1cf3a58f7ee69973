"""One row of ``teacher_logits``, collected from blocks of positions in what its encoding keeps.

Dimensions: P = scored positions, V = vocabulary, K = kept entries (the most of a position),
D = hidden width, N = uniforms of a position.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from schemas.distribution import (
    STICK_LEVELS,
    quantise_sticks,
    round_mantissa,
    row_key,
    split_gaps,
    uniforms,
)
from schemas.tables.teacher_logits import AnyLogits
from stages.signals.scoring.encoding import Measured, threshold_sample, top_k
from stages.signals.scoring.states import Asked
from stages.signals.teacher_logits.rounding import Rounded
from stages.signals.teacher_logits.stage import (
    ExactEncoding,
    TeacherLogitsStage,
    ThresholdEncoding,
    TopKEncoding,
)

Array = npt.NDArray[Any]


class RowEncoder:
    """Collects the blocks of one row and makes it."""

    def __init__(self, stage: TeacherLogitsStage, asked: Asked, vocab_size: int) -> None:
        """Draw the row's uniforms; they depend on its key alone."""
        self.encoding, self.table = stage.encoding, stage.table
        self.place: dict[str, Any] = {
            "sample_id": asked.sample_id,
            "first_target": asked.first_target,
        }
        self.columns: dict[str, list[Array]] = {}
        if isinstance(self.encoding, ThresholdEncoding):
            self.most = self.encoding.most(vocab_size)
            key = row_key(stage.seed, asked.sample_id)
            count = self.most + 1  # one for the systematic sample, the others for rounding sticks
            self.uniforms_PN = uniforms(key, len(asked.targets_P), count)

    def add(self, measured: Measured, hidden_PD: Tensor, start: int) -> None:
        """Encode the block that begins at position ``start``."""
        self._keep("next_token_logprobs_P", measured.next_token_logprobs_P)
        self._keep("entropies_P", measured.entropies_P)
        match self.encoding:
            case ThresholdEncoding(tau=tau):
                self._add_threshold(measured, start, tau)
            case TopKEncoding(k=k):
                kept = top_k(measured, k=k)
                self._keep("token_ids_PK", kept.token_ids_PK)
                self._keep("logprobs_PK", kept.logprobs_PK)
                self._keep("rest_logprobs_P", kept.rest_logprobs_P)
            case ExactEncoding(mean_kl=None):
                self._keep("hidden_PD", hidden_PD.to(torch.float16))
            case ExactEncoding():
                pass  # one step for all blocks: see ``row``

    def _add_threshold(self, measured: Measured, start: int, tau: float | None) -> None:
        uniforms_PN = self.uniforms_PN[start : start + len(measured.total_P)]
        offsets_P = torch.from_numpy(uniforms_PN[:, 0].copy()).to(measured.exp_PV.device)
        sample = threshold_sample(measured, offsets_P, k=self.most, tau=tau)
        ids_PK = sample.token_ids_PK.cpu().numpy()
        num_head_P = sample.num_head_P.cpu().numpy()
        entry_K = np.arange(self.most)
        in_head_PK = entry_K < num_head_P[:, None]
        fractions_E = sample.fractions_PK.cpu().numpy()[in_head_PK]
        codes_PK = np.zeros(in_head_PK.shape, np.uint8)
        codes_PK[in_head_PK] = quantise_sticks(fractions_E, uniforms_PN[:, 1:][in_head_PK])
        if tau is None:
            self._add("token_ids_PK", ids_PK)
            self._add("head_codes_E", codes_PK[in_head_PK])
        else:
            num_entries_P = sample.num_entries_P.cpu().numpy()
            num_entries_P, num_head_P = with_weight(num_entries_P, num_head_P, codes_PK)
            in_head_PK = entry_K < num_head_P[:, None]
            low_E, high_E = split_gaps(ids_PK, (entry_K < num_entries_P[:, None]) & ~in_head_PK)
            self._add("num_tail_P", (num_entries_P - num_head_P).astype(np.uint8))
            self._add("head_ids_H", ids_PK[in_head_PK])
            self._add("head_codes_H", codes_PK[in_head_PK])
            self._add("tail_gaps_low_E", low_E)
            self._add("tail_gaps_high_E", high_E)
        self._add("num_head_P", num_head_P.astype(np.uint8))

    def _keep(self, name: str, values: Tensor) -> None:
        self._add(name, values.cpu().numpy())

    def _add(self, name: str, values: Array) -> None:
        self.columns.setdefault(name, []).append(values)

    def row(self, states: Rounded | None = None) -> AnyLogits:
        """All blocks as one row of the encoding's table, whose states may be rounded as a whole."""
        arrays: dict[str, Any] = {
            name: np.concatenate(blocks) for name, blocks in self.columns.items()
        }
        if isinstance(self.encoding, ThresholdEncoding):
            for name in ("next_token_logprobs_P", "entropies_P"):
                arrays[name] = round_mantissa(arrays[name])
        if states is not None:
            arrays |= states.columns()
        row: AnyLogits = self.table.row(**self.place, **arrays)
        return row


def with_weight(num_entries_P: Array, num_head_P: Array, codes_PK: Array) -> tuple[Array, Array]:
    """Return the numbers of entries and of head entries that have a weight above 0.

    A fraction that was rounded to 1 leaves nothing to the entries after it.
    """
    in_head_PK = np.arange(codes_PK.shape[1]) < num_head_P[:, None]
    is_last_PK = in_head_PK & (codes_PK == len(STICK_LEVELS) - 1)
    ends_P, last_P = is_last_PK.any(axis=1), is_last_PK.argmax(axis=1) + 1
    return np.where(ends_P, last_P, num_entries_P), np.where(ends_P, last_P, num_head_P)
