"""The work of ``teacher_logits``: engine -> hidden states -> language head -> encoding -> rows.

The engine gives final hidden states; the language head turns them into logits one sequence at a
time, in blocks of positions, and the encoding keeps what the recipe asks for: on a GPU later, while
the engine is at what follows. A whole input shard goes to the engine as one unit and in one order,
so that a re-run meets the same batches.

Which positions are scored is in ``stages.signals.scoring.states``. An encoder-decoder reads a row
that names spans in two halves (``stages.models.encoder_decoder.halves``).
Of a preference pair only the responses are scored, each after the prompt, which is run once.

Dimensions: T = tokens, P = scored positions, V = vocabulary, K = kept entries, D = hidden width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from schemas.packing.coder import coding_library
from schemas.scored_spans import SCORED, span_targets
from schemas.tables.demonstrations import DEMONSTRATIONS
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
from stages.models.engines.sequences import require_room
from stages.models.spec import EngineOptions, HeadCheck
from stages.signals.scoring.encoding import cache_slices, measure
from stages.signals.scoring.logits import LogitBlocks
from stages.signals.scoring.responses import Prompted, prompted_of, response_states
from stages.signals.scoring.states import (
    Asked,
    Rows,
    Spanned,
    States,
    document_states,
    id_reason,
    scored_states,
    sequences_of,
)
from stages.signals.teacher_logits.calibration import read_calibration
from stages.signals.teacher_logits.encoder import RowEncoder
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
            return scored_states(engine, rows, context.engine)

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

    spanned: Spanned
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
    return id_reason(engine.head.vocab_size, row.spanned)


def pair_states(engine: Engine, pairs: Sequence[Prompted], options: EngineOptions) -> Rows:
    """Yield the states of each preference pair at the tokens of its two responses."""
    states = response_states(engine, pairs, options)
    for pair, hidden_PD, reason in zip(pairs, states.hidden_AD, states.reasons, strict=True):
        if hidden_PD is None:
            yield Rejected(pair.sample_id, reason)
            continue
        targets_P = pair.token_ids_A.astype(np.int64)
        yield States(Asked(pair.sample_id, len(pair.prompt_T), targets_P), hidden_PD)


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
