"""Rows of token ids -> the final hidden state at each scored position, one row after the other.

A row of T tokens has T - 1 scored positions; the hidden state at index t predicts token t + 1, so
entry j comes from index j. Where the rows name spans (``schemas.scored_spans``), their tokens alone
are scored, and what follows the last is not read. Rows that a model cannot read are rejected.

Dimensions: T = tokens, P = scored positions, N = states from the first to the last scored one,
D = hidden width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from schemas.scored_spans import SCORED, span_targets
from schemas.tables.demonstrations import DEMONSTRATIONS
from schemas.tables.documents import DOCUMENTS
from stages.models.engines.engine import Engine, HiddenStates
from stages.models.engines.sequences import TokenIds, require_room
from stages.models.spec import EngineOptions
from stages.stage import Rejected


@dataclass(frozen=True, slots=True)
class Asked:
    """One row to be: its key, and the tokens that its positions predict."""

    sample_id: str
    first_target: int
    targets_P: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class States:
    """One row that is asked about, and the final hidden state [P, D] at each of its positions."""

    asked: Asked
    hidden_PD: Tensor


Rows = Iterable[States | Rejected]


def scored_states(engine: Engine, rows: pa.Table, options: EngineOptions) -> Rows:
    """Yield the states of each row at the tokens that are scored: those of its spans, or all."""
    if SCORED in rows.schema.names:
        return span_states(engine, rows, options)
    longest = pc.max(pc.list_value_length(rows["input_ids_T"])).as_py() or 0
    require_room(engine, longest, options)
    return document_states(engine, rows)


def document_states(engine: HiddenStates, shard: pa.Table) -> Rows:
    """Yield the states of each row, every one of whose tokens is scored but the first."""
    rows = [row for batch in shard.to_batches() for row in sequences_of(batch)]
    fits = [len(ids_T) <= engine.max_length for _, ids_T in rows]
    hidden = engine.hidden_states([ids_T for (_, ids_T), ok in zip(rows, fits, strict=True) if ok])
    for (sample_id, ids_T), ok in zip(rows, fits, strict=True):
        if ok:
            yield States(Asked(sample_id, 1, np.asarray(ids_T[1:], np.int64)), next(hidden)[:-1])
        else:
            reason = f"longer than the model's window of {engine.max_length} tokens"
            yield Rejected(sample_id, reason)


def span_states(engine: Engine, shard: pa.Table, options: EngineOptions) -> Rows:
    """Yield the states of each row, whose column names the spans that are scored."""
    rows = [row for batch in shard.to_batches() for row in spanned_of(batch)]
    reasons = [_span_reason(engine, row) for row in rows]
    require_room(engine, max((len(row.read_T) for row in rows), default=0), options)
    fitting = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    states = iter(
        engine.last_hidden_states(
            [row.read_T for row in fitting], [row.num_states for row in fitting]
        )
    )
    for row, reason in zip(rows, reasons, strict=True):
        if reason:
            yield Rejected(row.sample_id, reason)
            continue
        hidden_ND, first = next(states), int(row.targets_P[0])
        wanted_P = torch.from_numpy(row.targets_P - first).to(hidden_ND.device)
        asked = Asked(row.sample_id, first, row.ids_T[row.targets_P].astype(np.int64))
        yield States(asked, hidden_ND[wanted_P])


@dataclass(frozen=True, slots=True)
class Spanned:
    """A row whose scored tokens are ``targets_P``, by index."""

    sample_id: str
    ids_T: TokenIds
    targets_P: npt.NDArray[np.int64]

    @property
    def read_T(self) -> TokenIds:
        """What the model has to read: all up to the last scored token, which nothing follows."""
        return self.ids_T[: max(self.targets_P, default=0)]

    @property
    def num_states(self) -> int:
        """From the state that predicts the first scored token to the last one."""
        return int(self.targets_P[-1] - self.targets_P[0]) + 1


def spanned_of(batch: pa.RecordBatch) -> Iterator[Spanned]:
    """Yield each row that names its spans, with the tokens that are scored."""
    spans = DEMONSTRATIONS.column_values(batch, SCORED)
    for (sample_id, ids_T), spans_S2 in zip(sequences_of(batch), spans, strict=True):
        yield Spanned(sample_id, ids_T, span_targets(spans_S2))


def _span_reason(engine: Engine, row: Spanned) -> str:
    """Say why the model cannot score a row, ``""`` if it can."""
    if not len(row.targets_P):
        return "no token of it is scored: it is a prompt"
    if len(row.read_T) > engine.max_length:
        return f"longer than the model's window of {engine.max_length} tokens"
    return id_reason(engine.head.vocab_size, row)


def id_reason(vocab_size: int, row: Spanned) -> str:
    """Say which token id the model does not have, ``""`` if it has all."""
    largest = int(row.ids_T.max())
    if largest >= vocab_size:
        return f"token id {largest} outside the teacher's vocabulary of {vocab_size}"
    return ""


def sequences_of(batch: pa.RecordBatch) -> Iterator[tuple[str, TokenIds]]:
    """Yield key and token ids of each row: two columns that every input table has."""
    names = ("sample_id", "input_ids_T")
    columns = [DOCUMENTS.column_values(batch, name) for name in names]
    yield from zip(*columns, strict=True)
