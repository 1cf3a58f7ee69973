"""The work of ``advantages``: two models' states -> both heads -> advantages -> a support -> rows.

Both models run over the same sequences, each response after its prompt; the heads turn their states
into logits in the same blocks of positions, so that no [P, V] block larger than a stated budget
exists, and advantages are differences of float32 log-probs. Entry j of a response belongs to the
state at ``len(prompt) - 1 + j`` of either model. Responses to one prompt lie end to end in a row.

Both models have to have every token: one that a model alone has would have no advantage, and its
mass no place. Where their numbers of logits differ by rows that no token uses, such rows are left
out of both: with n the ids of tokens, log-probs are of ``p(a) / sum_{b < n} p(b)``, here and in the
sums of a row. Where the numbers are equal, log-probs are the models' own. A response with such an
id is rejected.

Dimensions: P = response positions of a row, N = responses, V = vocabulary, K = kept entries,
S = likeliest tokens known of the student, D = hidden width.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from schemas.advantage_values import LEVEL_SIZES, value_codes
from schemas.distribution import round_mantissa, row_key, split_gaps, uniforms
from schemas.errors import ConfigError
from schemas.tables.prompted.advantages import HEAD_FOLDERS, AnyAdvantages
from schemas.tables.prompted.responses import RESPONSES, Responses
from stages.models.causal_lm.language_head import read_config
from stages.models.checkpoints.tokenizer_identity import num_token_ids
from stages.models.engines.engine import Engine
from stages.models.engines.engine_pair import EnginePair, ModelPair, head_of, open_engine_pair
from stages.models.spec import EngineOptions
from stages.signals.advantages.drawing import DrawnKept, drawn_support
from stages.signals.advantages.stage import (
    AdvantagesStage,
    ExactSupport,
    ReleasedSupport,
    ThresholdSupport,
    UnionTopKSupport,
)
from stages.signals.advantages.supports import (
    ReleasedKept,
    Scored,
    StudentTop,
    ThresholdKept,
    UnionKept,
    released_support,
    threshold_support,
    union_support,
)
from stages.signals.scoring.encoding import cache_slices
from stages.signals.scoring.logits import LogitBlocks
from stages.signals.scoring.responses import (
    Prompted,
    ResponseStates,
    prompted_of,
    response_states,
    sums_of,
)
from stages.stage import Rejected, StageContext, Work

AnyArray = npt.NDArray[Any]
BlockPair = tuple[LogitBlocks, LogitBlocks]
Kept = ThresholdKept | DrawnKept | UnionKept | ReleasedKept

_HIDDEN = ("teacher_hidden_PD", "reference_hidden_PR")


@contextmanager
def open_work(stage: AdvantagesStage, context: StageContext) -> Iterator[Work]:
    """Open both models; the work scores one shard of responses."""
    models = context.models[stage.model], context.models[stage.reference]
    known_ids = shared_ids(stage, models)
    if isinstance(stage.support, ExactSupport):
        write_side_files(stage, context)
    with open_engine_pair(models, options=context.engine) as pair:

        def work(shard: pa.Table) -> Iterable[AnyAdvantages | Rejected]:
            yield from score_shard(stage, pair, shard, context.engine, known_ids)
            context.notes["head_check"] = ", ".join(pair.head_checks)

        yield work


def write_side_files(stage: AdvantagesStage, context: StageContext) -> None:
    """Write both heads, which ``exact`` advantages are read back with."""
    for name, folder in zip((stage.model, stage.reference), HEAD_FOLDERS, strict=True):
        head_of(context.models[name], device="cpu").save(context.folder / folder)


def shared_ids(stage: AdvantagesStage, models: ModelPair) -> int | None:
    """Return how many ids count where the models' numbers of logits differ; None where all do.

    Raises ConfigError where a model lacks one that a token uses.
    """
    sizes = [int(read_config(model.local_base).get_text_config().vocab_size) for model in models]
    if sizes[0] == sizes[1]:
        return None
    used = num_token_ids(models[0].local_base) or max(sizes)
    if min(sizes) < used:
        raise ConfigError(
            f"model '{stage.model}' has {sizes[0]} logits and reference '{stage.reference}' "
            f"{sizes[1]}, the tokenizer uses {used} ids: an advantage needs both, use the "
            f"checkpoint that '{stage.model}' was aligned from"
        )
    k = getattr(stage.support, "k", None) or 0
    if k > used:
        raise ConfigError(f"support.k is {k}, the tokenizer has {used} tokens: lower k")
    return used


def score_shard(
    stage: AdvantagesStage,
    pair: EnginePair,
    shard: pa.Table,
    options: EngineOptions,
    num_ids: int | None = None,
) -> Iterator[AnyAdvantages | Rejected]:
    """Yield one row, or one rejection, for each row of ``shard``, in order.

    With ``num_ids`` only the logits before it count, of both models.
    """
    asked = asked_rows(pair, shard, options, num_ids)
    heads = pair.heads()
    blocks = LogitBlocks(heads[0]), LogitBlocks(heads[1])
    for row in asked:
        yield row if isinstance(row, Rejected) else score_row(stage, blocks, row, num_ids)


@dataclass(frozen=True, slots=True)
class Asked:
    """One row of responses, and the states [P, D] of aligned teacher and reference."""

    row: Responses
    prompted: Prompted
    hidden_PD: tuple[Tensor, Tensor]


def asked_rows(
    pair: EnginePair, shard: pa.Table, options: EngineOptions, num_ids: int | None
) -> list[Asked | Rejected]:
    """Run both models over the responses of ``shard``; ``num_ids`` as above."""
    rows = [row for batch in shard.to_batches() for row in RESPONSES.rows(batch)]
    prompted = prompted_of(shard)

    def run(engine: Engine) -> ResponseStates:
        return response_states(engine, prompted, options)

    teacher, reference = pair.each(run)
    asked: list[Asked | Rejected] = []
    for index, row in enumerate(rows):
        hidden = teacher.hidden_AD[index], reference.hidden_AD[index]
        if hidden[0] is None or hidden[1] is None:
            reason = teacher.reasons[index] or reference.reasons[index]
            asked.append(Rejected(row.sample_id, reason))
        elif num_ids is not None and row.response_ids_A.max() >= num_ids:
            asked.append(Rejected(row.sample_id, "a response id that no token uses"))
        else:
            asked.append(Asked(row, prompted[index], (hidden[0], hidden[1])))
    return asked


def score_row(
    stage: AdvantagesStage, blocks: BlockPair, asked: Asked, num_ids: int | None = None
) -> AnyAdvantages | Rejected:
    """Keep what the support asks for, block by block; ``num_ids`` as above."""
    keeper = _Keeper(stage, asked, blocks[0].head.weight_VD.device)
    for at, scored in scored_blocks(stage, blocks, asked, num_ids):
        if not scored.is_finite:
            return Rejected(asked.row.sample_id, "non-finite logits")
        keeper.add(scored, at)
    return keeper.row()


def scored_blocks(
    stage: AdvantagesStage, blocks: BlockPair, asked: Asked, num_ids: int | None
) -> Iterator[tuple[slice, Scored]]:
    """Yield a row's positions, a few at a time, with both models' log-probs at them."""
    device = blocks[0].head.weight_VD.device
    token_ids_P = torch.from_numpy(asked.row.response_ids_A.astype(np.int64)).to(device)
    teacher, reference = (
        block.of(hidden_PD) for block, hidden_PD in zip(blocks, asked.hidden_PD, strict=True)
    )
    for (start, teacher_PV), (_, reference_PV) in zip(teacher, reference, strict=True):
        for part in cache_slices(teacher_PV):
            at = slice(start + part.start, start + part.stop)
            yield (
                at,
                Scored(
                    teacher_PV[part, :num_ids].log_softmax(dim=1),
                    reference_PV[part, :num_ids].log_softmax(dim=1),
                    token_ids_P[at],
                    stage.beta,
                ),
            )


def student_of(row: Responses, device: torch.device) -> StudentTop:
    """Return what a row knows of the student that wrote it."""
    return StudentTop(
        torch.from_numpy(row.top_ids_AK.astype(np.int64)).to(device),
        torch.from_numpy(row.top_logprobs_AK.astype(np.float32)).to(device),
    )


class _Keeper:
    """Collects the blocks of one row and makes it."""

    def __init__(self, stage: AdvantagesStage, asked: Asked, device: torch.device) -> None:
        row = asked.row
        self.stage, self.asked = stage, asked
        self.columns: dict[str, list[AnyArray]] = {}
        self.student = student_of(row, device)
        # One for the draw; with tau one a token too, for rounding its value.
        most = getattr(stage.support, "max_k", None) or 0
        self.uniforms_PN = uniforms(
            row_key(stage.seed, row.sample_id), len(row.response_ids_A), 1 + most
        )
        self.offsets_P = torch.from_numpy(self.uniforms_PN[:, 0].copy()).to(device)

    def add(self, scored: Scored, at: slice) -> None:
        """Keep what is asked for of the block of positions ``at``."""
        self._keep("teacher_logprobs_P", scored.of_generated(scored.aligned_PV))
        self._keep("reference_logprobs_P", scored.of_generated(scored.reference_PV))
        support = self._support(scored, at)
        if isinstance(support, DrawnKept):
            self._keep_drawn(support, at)
        elif support is not None:
            for column in fields(support):
                self._keep(column.name, getattr(support, column.name))

    def _support(self, scored: Scored, at: slice) -> Kept | None:
        student = StudentTop(self.student.token_ids_PS[at], self.student.logprobs_PS[at])
        match self.stage.support:
            case ThresholdSupport(tau=float(tau), max_k=int(max_k)):
                return drawn_support(scored, student, self.offsets_P[at], tau=tau, max_k=max_k)
            case ThresholdSupport(k=int(k)):
                return threshold_support(scored, student, self.offsets_P[at], k=k)
            case UnionTopKSupport(k=k):
                return union_support(scored, student, k=k)
            case ReleasedSupport(k=k):
                return released_support(scored, k=k)
            case _:
                return None

    def _keep_drawn(self, kept: DrawnKept, at: slice) -> None:
        is_kept_PK = kept.is_kept_PK.cpu().numpy()
        low_E, high_E = split_gaps(kept.token_ids_PK.cpu().numpy(), is_kept_PK)
        self._add("num_entries_P", is_kept_PK.sum(axis=1))
        self._add("id_gaps_low_E", low_E)
        self._add("id_gaps_high_E", high_E)
        self._add("values_E", kept.values_PK.cpu().numpy()[is_kept_PK])
        self._add("uniforms_E", self.uniforms_PN[at, 1:][is_kept_PK])
        self._keep("rest_advantages_P", kept.rest_advantages_P)

    def _keep(self, name: str, values: Tensor) -> None:
        self._add(name, values.cpu().numpy())

    def _add(self, name: str, values: AnyArray) -> None:
        self.columns.setdefault(name, []).append(values)

    def row(self) -> AnyAdvantages | Rejected:
        """All blocks as one row of the support's table."""
        sample_id = self.asked.row.sample_id
        columns = {name: np.concatenate(blocks) for name, blocks in self.columns.items()}
        teacher_P, reference_P = (
            columns.pop(f"{name}_logprobs_P") for name in ("teacher", "reference")
        )
        columns["token_advantages_P"] = (teacher_P - reference_P) * np.float32(self.stage.beta)
        sums = [
            sums_of(self.asked.prompted, p.astype(np.float64)) for p in (teacher_P, reference_P)
        ]
        values_E, uniforms_E = (columns.pop(f"{name}_E", None) for name in ("values", "uniforms"))
        if not all(_fits_float16(values) for values in columns.values()):
            return Rejected(sample_id, "an advantage that float16 cannot hold")
        if values_E is not None and uniforms_E is not None:
            if not np.abs(values_E).max(initial=0.0) <= LEVEL_SIZES[-1]:
                return Rejected(sample_id, f"a value of more than {LEVEL_SIZES[-1]:.2g} nats")
            columns["value_codes_E"] = value_codes(values_E, uniforms_E)
            columns["token_advantages_P"] = round_mantissa(columns["token_advantages_P"])
        elif isinstance(self.stage.support, ThresholdSupport):
            columns["advantages_PK"] = round_mantissa(columns["advantages_PK"])
        if isinstance(self.stage.support, ExactSupport):
            for name, hidden_PD in zip(_HIDDEN, self.asked.hidden_PD, strict=True):
                columns[name] = hidden_PD.float().numpy()
        row: AnyAdvantages = self.stage.table.row(
            sample_id=sample_id,
            teacher_logprobs_N=sums[0].astype(np.float32),
            reference_logprobs_N=sums[1].astype(np.float32),
            **columns,
        )
        return row


def _fits_float16(values: AnyArray) -> bool:
    """Whether all are finite once they are narrowed; token ids and counts are not."""
    if values.dtype.kind != "f":
        return True
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(np.float16)).all())
