"""The work of ``teacher_logits``: engine -> hidden states -> language head -> encoding -> rows.

The engine gives final hidden states; the language head turns them into logits one sequence at a
time, in blocks of positions, and the encoding keeps what the recipe asks for: on a GPU later, while
the engine is at what follows. A whole input shard goes to the engine as one unit and in one order,
so that a re-run meets the same batches.

Positions: a row of T tokens has T - 1 scored positions; the hidden state at index t predicts
token t + 1, so entry j comes from index j and ``first_target`` is 1. Where the input's rows name
spans (``schemas.scored_spans``), their tokens alone are scored, and what follows the last is not
read. An encoder-decoder reads such a row in two halves (``stages.models.encoder_decoder.halves``).
Of a preference pair only the responses are scored, each after the prompt, which is run once.

Dimensions: T = tokens, P = scored positions, V = vocabulary, K = kept entries, D = hidden width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from schemas.packing.coder import coding_library
from schemas.scored_spans import SCORED, span_targets
from schemas.tables.demonstrations import DEMONSTRATIONS
from schemas.tables.documents import DOCUMENTS
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from schemas.tables.teacher_logits import AnyLogits
from stages.models.causal_lm.language_head import LanguageHead, read_config
from stages.models.encoder_decoder.halves import decoder_begins, decoder_spans, frame_of
from stages.models.engines.encoder_decoder_engine import (
    EncoderDecoderEngine,
    Read,
    open_encoder_decoder_engine,
)
from stages.models.engines.engine import Engine, HiddenStates, open_model
from stages.models.engines.engine_pair import head_of
from stages.models.engines.sequences import TokenIds, require_room
from stages.models.spec import EngineOptions, HeadCheck
from stages.signals.scoring.encoding import cache_slices, measure
from stages.signals.scoring.logits import LogitBlocks
from stages.signals.scoring.responses import Prompted, prompted_of, response_states
from stages.signals.teacher_logits.calibration import read_calibration
from stages.signals.teacher_logits.encoder import Asked, RowEncoder
from stages.signals.teacher_logits.rounding import rounded
from stages.signals.teacher_logits.stage import ExactEncoding, TeacherLogitsStage
from stages.signals.teacher_logits.tau import with_tau
from stages.stage import Later, Rejected, StageContext, Work

Scored = AnyLogits | Rejected | Later
FLOAT16_MAX = 65504.0


@contextmanager
def open_work(stage: TeacherLogitsStage, context: StageContext) -> Iterator[Work]:
    """Start the engine of ``stage.model``; the work scores one shard of token sequences.

    With ``mean_k`` the same engine finds the table's tau first, where no run has yet.
    """
    if stage.bind(context).packed:
        coding_library()  # rather than after the first shard
    with open_teacher(stage, context) as teacher:
        context.notes["head_check"] = teacher.head_check
        if isinstance(stage.encoding, ExactEncoding):
            teacher.head.save(context.folder)

        def score(asked: TeacherLogitsStage, rows: pa.Table) -> Iterable[Scored]:
            return encoded(asked, teacher.head, teacher.states(rows))

        if stage.mean_k is not None:
            stage = with_tau(stage, context, score)
        yield partial(score, stage)


@dataclass(frozen=True, slots=True)
class States:
    """One row that is asked about, and the final hidden state [P, D] at each of its positions."""

    asked: Asked
    hidden_PD: Tensor


Rows = Iterable[States | Rejected]


@dataclass(frozen=True, slots=True)
class Teacher:
    """An open teacher: ``states`` of some rows of the input, one or a rejection each, in order."""

    head: LanguageHead
    head_check: HeadCheck
    states: Callable[[pa.Table], Rows]


@contextmanager
def open_teacher(stage: TeacherLogitsStage, context: StageContext) -> Iterator[Teacher]:
    """Start the engine of ``stage.model`` for rows of the input, whatever is kept of them."""
    model = context.models[stage.model]
    if frame_of(read_config(model.path)) is not None:
        with open_encoder_decoder_engine(model, context.engine) as two_halves:
            of_halves = partial(halves_states, two_halves, options=context.engine)
            yield Teacher(two_halves.head, two_halves.head_check, of_halves)
        return
    of_pairs = context.input_table == PREFERENCE_PAIRS.name
    with open_model(model, context.engine, share_prefixes=of_pairs) as engine:

        def states(rows: pa.Table) -> Rows:
            if of_pairs:
                return pair_states(engine, prompted_of(rows), context.engine)
            if SCORED in rows.schema.names:
                return span_states(engine, rows, context.engine)
            longest = pc.max(pc.list_value_length(rows["input_ids_T"])).as_py() or 0
            require_room(engine, longest, context.engine)
            return document_states(engine, rows)

        yield Teacher(engine.head, engine.head_check, states)


def write_side_files(stage: TeacherLogitsStage, context: StageContext) -> None:
    """Write the head that an ``exact`` table is read back with; see that a found tau is there."""
    if stage.mean_k is not None:
        if read_calibration(context.folder) is None:
            with open_work(stage, context):
                pass
        return
    head_of(context.models[stage.model], device="cpu").save(context.folder)


def score_shard(
    stage: TeacherLogitsStage, engine: HiddenStates, shard: pa.Table
) -> Iterable[Scored]:
    """Yield one row, or one rejection, for each row of ``shard``, in order."""
    return encoded(stage, engine.head, document_states(engine, shard))


def encoded(stage: TeacherLogitsStage, head: LanguageHead, rows: Rows) -> Iterable[Scored]:
    """Yield what the stage's encoding keeps of each row, and the rejections as they are."""
    blocks = LogitBlocks(head)
    for row in rows:
        if isinstance(row, Rejected):
            yield row
        else:
            yield blocks.later(row.hidden_PD, partial(_encode, stage, blocks, row.asked))


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


def halves_states(engine: EncoderDecoderEngine, shard: pa.Table, options: EngineOptions) -> Rows:
    """Yield the states of each row of ``demonstrations``, which is read in two halves."""
    rows = [row for batch in shard.to_batches() for row in halves_of(batch)]
    reasons = [_halves_reason(engine, row) for row in rows]
    require_room(engine, max((engine.longest_half(row.read) for row in rows), default=0), options)
    fitting = [row.read for row, reason in zip(rows, reasons, strict=True) if not reason]
    states = iter(engine.said_states(fitting))
    for row, reason in zip(rows, reasons, strict=True):
        if reason:
            yield Rejected(row.spanned.sample_id, reason)
            continue
        hidden_AD, targets_P = next(states), row.spanned.targets_P
        wanted_P = torch.from_numpy(targets_P - row.begins).to(hidden_AD.device)
        next_ids_P = row.spanned.ids_T[targets_P].astype(np.int64)
        asked = Asked(row.spanned.sample_id, int(targets_P[0]), next_ids_P)
        yield States(asked, hidden_AD[wanted_P])


@dataclass(frozen=True, slots=True)
class Halves:
    """A row of which the decoder says the tokens from ``begins`` on, the scored ones among them."""

    spanned: "Spanned"
    begins: int

    @property
    def read(self) -> Read:
        """Both halves."""
        ids_T = self.spanned.ids_T
        return Read(ids_T[: self.begins], ids_T[self.begins :])


def halves_of(batch: pa.RecordBatch) -> Iterator[Halves]:
    """Yield each row of ``demonstrations`` as an encoder-decoder reads it."""
    names = (SCORED, "query_start", "answer_start")
    columns = [DEMONSTRATIONS.column_values(batch, name) for name in names]
    for (sample_id, ids_T), spans_S2, *starts in zip(sequences_of(batch), *columns, strict=True):
        begins = decoder_begins(len(ids_T), *starts)
        targets_P = span_targets(decoder_spans(spans_S2, begins))
        yield Halves(Spanned(sample_id, ids_T, targets_P), begins)


def _halves_reason(engine: EncoderDecoderEngine, row: Halves) -> str:
    """Say why an encoder-decoder cannot score a row, ``""`` if it can."""
    if not len(row.spanned.targets_P):
        return "none of its scored tokens is one that a decoder says"
    if engine.longest_half(row.read) > engine.max_length:
        return f"longer than the model's window of {engine.max_length} tokens"
    return _id_reason(engine, row.spanned)


@dataclass(frozen=True, slots=True)
class Spanned:
    """A row whose scored tokens are ``targets_P``, by index."""

    sample_id: str
    ids_T: TokenIds
    targets_P: npt.NDArray[np.int64]

    @property
    def read_T(self) -> TokenIds:
        """What the teacher has to read: all up to the last scored token, which nothing follows."""
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
    """Say why a teacher cannot score a row, ``""`` if it can."""
    if not len(row.targets_P):
        return "no token of it is scored: it is a prompt"
    if len(row.read_T) > engine.max_length:
        return f"longer than the model's window of {engine.max_length} tokens"
    return _id_reason(engine, row)


def _id_reason(engine: Engine | EncoderDecoderEngine, row: Spanned) -> str:
    largest, vocab_size = int(row.ids_T.max()), engine.head.vocab_size
    if largest >= vocab_size:
        return f"token id {largest} outside the teacher's vocabulary of {vocab_size}"
    return ""


def pair_states(engine: Engine, pairs: Sequence[Prompted], options: EngineOptions) -> Rows:
    """Yield the states of each preference pair at the tokens of its two responses."""
    states = response_states(engine, pairs, options)
    for pair, hidden_PD, reason in zip(pairs, states.hidden_AD, states.reasons, strict=True):
        if hidden_PD is None:
            yield Rejected(pair.sample_id, reason)
            continue
        targets_P = pair.token_ids_A.astype(np.int64)
        yield States(Asked(pair.sample_id, len(pair.prompt_T), targets_P), hidden_PD)


def sequences_of(batch: pa.RecordBatch) -> Iterator[tuple[str, TokenIds]]:
    """Yield key and token ids of each row: two columns that every input table has."""
    names = ("sample_id", "input_ids_T")
    columns = [DOCUMENTS.column_values(batch, name) for name in names]
    yield from zip(*columns, strict=True)


def _encode(
    stage: TeacherLogitsStage, blocks: LogitBlocks, asked: Asked, hidden_PD: Tensor
) -> AnyLogits | Rejected:
    """Encode one row's positions, block by block."""
    targets_P = torch.from_numpy(asked.targets_P).to(blocks.head.weight_VD.device)
    if isinstance(stage.encoding, ExactEncoding) and not (hidden_PD.abs() <= FLOAT16_MAX).all():
        return Rejected(asked.sample_id, "hidden state outside float16")
    encoder = RowEncoder(stage, asked, blocks.head.vocab_size)
    for start, logits_PV in blocks.of(hidden_PD):
        for part in cache_slices(logits_PV):
            at = slice(start + part.start, start + part.stop)
            measured = measure(logits_PV[part], targets_P[at])
            if not measured.finite:
                return Rejected(asked.sample_id, "non-finite logits")
            encoder.add(measured, hidden_PD[at], at.start)
    if isinstance(stage.encoding, ExactEncoding) and stage.encoding.mean_kl is not None:
        return encoder.row(rounded(blocks.head, hidden_PD, stage.encoding.mean_kl))
    return encoder.row()
