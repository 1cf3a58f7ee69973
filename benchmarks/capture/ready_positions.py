"""Real positions with a head's work done, and an engine and a head that hand them over.

Dimensions: N = ready positions, K = kept entries, P = positions of a row, T = tokens.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.storage.real_positions import MODEL, ROW_TOKENS, load_domains, see
from schemas.distribution import uniforms
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.engines.sequences import TokenIds, windows
from stages.signals.scoring.encoding import Measured, ThresholdSample, measure, threshold_sample
from stages.signals.scoring.logits import LogitBlocks
from stages.signals.teacher_logits import encoder, work

AnyArray = npt.NDArray[Any]

K, VOCAB_SIZE = 16, 49_152
_WAITS = 128  # of a window for the device; after each the engine needs Python's lock
BYTES_PER_TOKEN = 2 * 4096  # of a final hidden state


@dataclass(frozen=True)
class Ready:
    """What a head and ``threshold_sample`` made of real positions, N of them in rows of P."""

    next_logprobs_N: AnyArray
    entropies_N: AnyArray
    token_ids_NK: AnyArray
    num_head_N: AnyArray
    fractions_NK: AnyArray

    @property
    def num_rows(self) -> int:
        """Rows of ``ROW_TOKENS`` tokens."""
        return len(self.num_head_N) // (ROW_TOKENS - 1)


def real_ready(cache: Path, per_domain: int) -> Ready:
    """Return real positions, made by the teacher once and kept in the cache."""
    file = cache / "benchmarks" / f"overlap-{per_domain}-rows.npz"
    if not file.is_file():
        print(f"running the teacher once: {file}", flush=True)
        domains = load_domains(cache, per_domain)
        rows_RT = torch.cat([domain.measured_RT for domain in domains])
        seen = see(cache / MODEL, rows_RT, cache)
        parts = [
            _ready_row(seen.head, hidden_TD[:-1], ids_T[1:], key)
            for key, (hidden_TD, ids_T) in enumerate(zip(seen.hidden_RTD, rows_RT, strict=True))
        ]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **columns)  # type: ignore[arg-type]
    with np.load(file) as columns:
        return Ready(**columns)


def _ready_row(
    head: LanguageHead, hidden_PD: Tensor, targets_P: Tensor, key: int
) -> dict[str, AnyArray]:
    found = []
    for start, logits_PV in LogitBlocks(head).of(hidden_PD):
        measured = measure(logits_PV, targets_P[start : start + len(logits_PV)])
        offsets_P = torch.from_numpy(uniforms(key + start, len(logits_PV), 1)[:, 0].copy())
        sample = threshold_sample(measured, offsets_P, k=K)
        found.append(
            {
                "next_logprobs_N": measured.next_token_logprobs_P.numpy(),
                "entropies_N": measured.entropies_P.numpy(),
                "token_ids_NK": sample.token_ids_PK.numpy(),
                "num_head_N": sample.num_head_P.numpy(),
                "fractions_NK": sample.fractions_PK.numpy(),
            }
        )
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


class StandInHead:
    """A head whose logits are the numbers of the positions; it stands on a device of its own."""

    vocab_size = VOCAB_SIZE
    weight_VD = torch.empty(0, device="meta")

    def positions_per_chunk(self, budget_bytes: int) -> int:
        """Any number of positions fits."""
        return ROW_TOKENS

    def logits(self, hidden_PD: Tensor, *, out_PV: Tensor | None = None) -> Tensor:
        """Return where each position lies [P, 1]."""
        return hidden_PD[:, :1]


class StandInEngine:
    """Takes the time of ``rate`` tokens a second for a window; a state names its position."""

    max_length = ROW_TOKENS

    def __init__(self, rate: float, num_rows: int) -> None:
        """Yield ``num_rows`` rows of ready positions again and again."""
        self.rate, self.num_rows = rate, num_rows
        self.head: Any = StandInHead()

    def hidden_states(self, sequences: Sequence[TokenIds]) -> Iterator[Tensor]:
        """Yield [T, D] for each sequence: a view of [T, 1], which takes no memory."""
        row = 0
        for window in windows(sequences, bytes_per_token=BYTES_PER_TOKEN):
            for _ in range(_WAITS):
                time.sleep(sum(map(len, window)) / self.rate / _WAITS)
            starts_R = torch.arange(row, row + len(window)) % self.num_rows * (ROW_TOKENS - 1)
            places_RT = starts_R[:, None] + torch.arange(ROW_TOKENS)
            width = BYTES_PER_TOKEN // places_RT.itemsize
            yield from places_RT[:, :, None].expand(-1, -1, width).unbind()
            row += len(window)


@contextmanager
def handed_over(ready: Ready) -> Iterator[None]:
    """Let the stage have ready values in the place of what it makes of logits."""
    columns = {name: torch.from_numpy(values) for name, values in vars(ready).items()}

    def measured_of(places_P1: Tensor, next_token_ids_P: Tensor) -> Measured:
        at = _at(places_P1)
        next_logprobs_P = columns["next_logprobs_N"][at]
        entropies_P = columns["entropies_N"][at]
        unused = places_P1
        return Measured(places_P1, unused, unused, entropies_P, next_logprobs_P, entropies_P)

    def sample_of(
        measured: Measured, offsets_P: Tensor, *, k: int, tau: float | None = None
    ) -> ThresholdSample:
        at = _at(measured.exp_PV)
        ids_PK, num_head_P = columns["token_ids_NK"][at], columns["num_head_N"][at]
        num_entries_P = torch.full_like(num_head_P, k)
        return ThresholdSample(ids_PK, num_entries_P, num_head_P, columns["fractions_NK"][at])

    with (
        patch.object(work, "measure", measured_of),
        patch.object(encoder, "threshold_sample", sample_of),
    ):
        yield


def _at(places_P1: Tensor) -> slice:
    start = int(places_P1[0, 0])
    return slice(start, start + len(places_P1))
