"""Results of ``storage.py``: each scheme's errors against each student, by domain and over all.

Dimensions: C = positions of a chunk, P = positions, V = vocabulary, D = hidden width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.storage.real_positions import ROW_TOKENS, Seen
from benchmarks.storage.signal_error import (
    Chunk,
    Comparison,
    Decoded,
    SchemeError,
    Taught,
    dense_error,
    divergences,
    sparse_error,
)
from benchmarks.storage.storage_schemes import CHUNK, Scheme

STUDENTS = ("distilled", "close")
BATCH_ROWS = 8


@dataclass
class Result:
    """One scheme against one student in one domain."""

    domain: str
    student: str
    scheme: Scheme
    error: SchemeError
    divergence_P: Tensor | None


def measure_domain(domain: str, schemes: list[Scheme], seen: dict[str, Seen]) -> list[Result]:
    """Return the errors of every scheme against both students."""
    tally = Tally(schemes, seen)
    num_rows = len(schemes[0].rows)
    for first in range(0, num_rows, BATCH_ROWS):
        tally.add_batch(range(first, min(first + BATCH_ROWS, num_rows)))
    results = []
    for student in STUDENTS:
        for scheme in schemes:
            pieces = tally.divergences[scheme.name]
            divergence_P = torch.cat(pieces) if pieces else None
            error = tally.errors[student, scheme.name]
            results.append(Result(domain, student, scheme, error, divergence_P))
    return results


class Tally:
    """Errors of all schemes against all students, row by row."""

    def __init__(self, schemes: list[Scheme], seen: dict[str, Seen]) -> None:
        """Begin with nothing measured."""
        self.schemes, self.seen = schemes, seen
        self.errors = {(s, scheme.name): SchemeError() for s in STUDENTS for scheme in schemes}
        self.divergences: dict[str, list[Tensor]] = {scheme.name: [] for scheme in schemes}
        self.weight_sums = {s: seen[s].head.weight_VD.sum(0) for s in STUDENTS}

    def add_batch(self, rows: Iterable[int]) -> None:
        """Measure a batch of rows, whose gradients by logits are summed."""
        vocab_size = self.seen["teacher"].head.vocab_size
        references = {student: torch.zeros(vocab_size) for student in STUDENTS}
        sums = {key: torch.zeros(vocab_size) for key in self.errors}
        for row in rows:
            losses: dict[tuple[str, str], list[Tensor]] = {key: [] for key in self.errors}
            for start in range(0, ROW_TOKENS - 1, CHUNK):
                span = slice(start, min(start + CHUNK, ROW_TOKENS - 1))
                self._add_chunk(row, span, references, (sums, losses))
            for key, parts in losses.items():
                self.errors[key].losses.append(torch.cat(parts))
                self.errors[key].row_means.append(float(torch.cat(parts).mean()))
        for key, error_V in sums.items():
            self.errors[key].batch_logits.add(error_V, references[key[0]])

    def _add_chunk(
        self,
        row: int,
        span: slice,
        references: dict[str, Tensor],
        into: tuple[dict[tuple[str, str], Tensor], dict[tuple[str, str], list[Tensor]]],
    ) -> None:
        taught = Taught(_logprobs(self.seen["teacher"], row, span))
        kept = {scheme.name: self._kept(scheme, row, span) for scheme in self.schemes}
        for name, decoded in kept.items():
            self._add_divergence(name, taught, decoded)
        for student in STUDENTS:
            seen, (sums, losses) = self.seen[student], into
            chunk = Chunk(taught, _logprobs(seen, row, span), seen.head.weight_VD)
            hidden_CD, logits_V = chunk.reference()
            references[student] += logits_V
            for name, decoded in kept.items():
                if isinstance(decoded, Tensor):
                    error = dense_error(chunk, decoded.exp())
                else:
                    error = sparse_error(chunk, decoded, self.weight_sums[student])
                losses[student, name].append(error.loss_C)
                self.errors[student, name].hidden.add(error.hidden_CD, hidden_CD)
                sums[student, name] += error.logits_V

    def _kept(self, scheme: Scheme, row: int, span: slice) -> Decoded | Tensor:
        """Return a chunk's entries, or the log-probs [C, V] of a scheme that keeps them all."""
        rows = scheme.rows[row]
        if isinstance(rows, Tensor):
            return self.seen["teacher"].head.logits(rows[span]).log_softmax(-1)
        return Decoded(rows.token_ids_CK[span], rows.weights_CK[span], rows.rest_C[span], rows.rest)

    def _add_divergence(self, name: str, taught: Taught, kept: Decoded | Tensor) -> None:
        """Count KL(p || q) where it is finite."""
        if isinstance(kept, Tensor):
            divergence_C = torch.linalg.vecdot(taught.probs_CV, taught.logprobs_CV - kept)
            self.divergences[name].append(divergence_C)
        elif kept.rest != "nothing":
            self.divergences[name].append(divergences(taught, kept))


def _logprobs(seen: Seen, row: int, span: slice) -> Tensor:
    return seen.head.logits(seen.hidden_RTD[row, span]).log_softmax(-1)


def overall(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the rows over all domains: errors merged, bytes averaged (domains are equal)."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.student, result.scheme.name), []).append(result)
    return [as_row(_merged(group)) for group in groups.values()]


def _merged(group: Sequence[Result]) -> Result:
    first = group[0].scheme
    containers = [r.scheme.container for r in group if r.scheme.container is not None]
    scheme = Scheme(
        first.name,
        first.family,
        float(np.mean([result.scheme.entries for result in group])),
        float(np.mean([result.scheme.bytes for result in group])),
        [],
        float(np.mean(containers)) if containers else None,
    )
    error = SchemeError(
        [loss_P for result in group for loss_P in result.error.losses],
        [mean for result in group for mean in result.error.row_means],
        _sum([result.error.hidden for result in group]),
        _sum([result.error.batch_logits for result in group]),
    )
    parts = [result.divergence_P for result in group if result.divergence_P is not None]
    divergence_P = torch.cat(parts) if parts else None
    return Result("all", group[0].student, scheme, error, divergence_P)


def _sum(parts: Sequence[Comparison]) -> Comparison:
    names = ("error", "product", "reference")
    return Comparison(*(sum(getattr(part, name) for part in parts) for name in names))


def as_row(result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {
        "domain": result.domain,
        "student": result.student,
        "scheme": result.scheme.name,
        "family": result.scheme.family,
        "entries": round(result.scheme.entries, 2),
        "bytes": round(result.scheme.bytes, 2),
        **result.error.figures(),
    }
    if result.scheme.container is not None:
        row["container_bytes"] = round(result.scheme.container, 2)
    if result.divergence_P is not None:
        row["kl_mean"] = float(result.divergence_P.double().mean())
        row["kl_p50"] = float(result.divergence_P.median())
        row["kl_p99"] = float(result.divergence_P.quantile(0.99))
    return row
