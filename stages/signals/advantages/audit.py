"""What an audit asks of two live models about rows of ``advantages``, whatever their support.

Both models read a row's prompt and responses whole: the row holds sums over whole responses.

Dimensions: P = response positions of a row, N = responses, V = vocabulary, D = hidden width.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from schemas.distribution import row_key, uniforms
from schemas.storage.manifest import read_manifest
from schemas.storage.shard_cache import local_files
from schemas.tables.prompted.advantages import HEAD_FOLDERS
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.engines.engine_pair import open_engine_pair
from stages.signals.advantages.kept_apart import DRAWS, kept_apart
from stages.signals.advantages.stage import (
    AdvantagesStage,
    ExactSupport,
    ReleasedSupport,
    ThresholdSupport,
    UnionTopKSupport,
)
from stages.signals.advantages.supports import Scored, StudentTop
from stages.signals.advantages.work import (
    Asked,
    BlockPair,
    asked_rows,
    scored_blocks,
    shared_ids,
    student_of,
)
from stages.signals.scoring.agreement import (
    NATS,
    SUMS,
    Answer,
    Ask,
    Compared,
    F64Array,
    Measure,
    Question,
    Row,
    beyond_float16,
    beyond_mantissa,
    of_other_shape,
    over_length,
)
from stages.signals.scoring.logits import LogitBlocks
from stages.signals.scoring.responses import prompted_of, sums_of
from stages.stage import Rejected, StageContext

_HIDDEN = ("teacher_hidden_PD", "reference_hidden_PR")
_SUMS = ("teacher_logprobs_N", "reference_logprobs_N")
_SHARES = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 0.1}


def measures(stage: AdvantagesStage) -> dict[str, Measure]:
    """Return what is compared at each position, and of each response, by name."""
    found = {
        "token_advantages_P": Measure("nats", "advantage of the token that was said", NATS),
        **{name: Measure("nats", f"sum of a response, {name[:-11]}'s", SUMS) for name in _SUMS},
    }
    match stage.support:
        case ThresholdSupport(tau=float()):
            found["rest_advantages_P"] = Measure("nats", "mean advantage of the rest", NATS)
            found["values"] = Measure("of its size", "value of a kept token", _SHARES)
            found["draw"] = Measure("tokens", "draw of the kept tokens", _SHARES)
        case ThresholdSupport():
            found["advantages_PK"] = Measure("nats", "advantage of a kept token", NATS)
            found["log_inclusions_PK"] = Measure("nats", "log-inclusion of a kept token", _SHARES)
            found["draw"] = Measure("of all weight", "draw of the kept tokens", _SHARES)
        case UnionTopKSupport():
            found["choice"] = Measure("nats", "choice of the kept tokens", NATS)
            found["advantages"] = Measure("nats", "advantage of a kept token", NATS)
            found["rest_advantages_P"] = Measure("nats", "advantage of the rest", NATS)
        case ReleasedSupport():
            found["choice"] = Measure("nats", "choice of the kept tokens", NATS)
            found["advantages"] = Measure("nats", "advantage of a kept token", NATS)
        case ExactSupport():
            for name in _HIDDEN:
                whose = name.partition("_")[0]
                found[name] = Measure("of its length", f"hidden state of the {whose}", _SHARES)
    return found


def questions(
    stage: AdvantagesStage, context: StageContext, rows: pa.Table, most: int | None
) -> list[Question]:
    """Return what to ask about some rows of responses: all of each."""
    asked = []
    for at, row in enumerate(prompted_of(rows)):
        num = sum(row.counts)
        expected = {"number of positions": num, "number of responses": len(row.responses)}
        num_read = len(row.prompt_T) + num
        question = Question(row.sample_id, rows.slice(at, 1), num_read, np.arange(num), expected)
        asked.append(question)
    return asked


@contextmanager
def open_live(stage: AdvantagesStage, context: StageContext) -> Iterator[Ask]:
    """Open both models in the engine that the context names; nothing is written."""
    models = context.models[stage.model], context.models[stage.reference]
    num_ids = shared_ids(stage, models)
    stored: list[LanguageHead] = []
    if isinstance(stage.support, ExactSupport):
        place = local_files(context.folder, read_manifest(context.folder).files)
        folders = [place / name for name in HEAD_FOLDERS]
        stored = [LanguageHead.load(folder, device="cpu") for folder in folders]
    with open_engine_pair(models, options=context.engine) as pair:

        def ask(asked: Sequence[Question]) -> Iterable[Answer | Rejected]:
            rows = pa.concat_tables([question.rows for question in asked])
            states = asked_rows(pair, rows, context.engine, num_ids)
            heads = pair.heads()
            other = [
                folder
                for folder, head, live in zip(HEAD_FOLDERS, stored, heads, strict=False)
                if not torch.equal(head.weight_VD, live.weight_VD.to(head.weight_VD))
            ]
            blocks = LogitBlocks(heads[0]), LogitBlocks(heads[1])
            problem = f"{other[0]} beside the shards is not that of the live model" if other else ""
            for question, row in zip(asked, states, strict=True):
                if isinstance(row, Rejected):
                    yield row
                else:
                    yield Live(stage, question, row, blocks, num_ids, problem)

        yield ask


@dataclass(frozen=True, slots=True)
class Live:
    """Two live models' states of one row, and the heads that make log-probs of them."""

    stage: AdvantagesStage
    question: Question
    asked: Asked
    blocks: BlockPair
    num_ids: int | None
    problem: str

    def beside(self, stored: Row) -> Compared:
        """Compare with the stored row: each of its columns."""
        found = {
            "number of positions": len(stored["token_advantages_P"]),
            "number of responses": len(stored["teacher_logprobs_N"]),
        }
        if (other := of_other_shape(self.question, found)) is not None:
            return other
        uniforms_PN = self._uniforms()
        parts = [self._kept(stored, at, scored, uniforms_PN)[0] for at, scored in self._blocks()]
        apart = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        live_P, sums = self._said()
        is_rounded = isinstance(self.stage.support, ThresholdSupport)
        beyond = beyond_mantissa if is_rounded else beyond_float16
        apart["token_advantages_P"] = beyond(stored["token_advantages_P"], live_P)
        for name, sums_N in zip(_SUMS, sums, strict=True):
            apart[name] = np.abs(np.asarray(stored[name], np.float64) - sums_N)
        apart |= self._states_apart([stored[name] for name in _HIDDEN if name in stored])
        return Compared(
            sample_id=self.question.sample_id,
            places_P=self.question.places_P,
            apart=apart,
            stored_P=np.asarray(stored["token_advantages_P"], np.float64),
            live_P=live_P,
            problem=self.problem,
        )

    def beside_live(self, other: "Live", stored: Row) -> dict[str, F64Array]:
        """Return how far two passes are apart in the live numbers that a stored row is held to."""
        found: dict[str, list[F64Array]] = {}
        uniforms_PN = self._uniforms()
        # Answers of two questions never share the memory of their blocks.
        for (at, one), (_, two) in zip(self._blocks(), other._blocks(), strict=True):
            ours, theirs = (self._kept(stored, at, each, uniforms_PN)[1] for each in (one, two))
            for name, values in ours.items():
                differences = np.abs(values - theirs[name]).reshape(len(values), -1)
                by_position = differences.sum(axis=1) if name in DRAWS else differences.max(axis=1)
                found.setdefault(name, []).append(by_position)
        apart = {name: np.concatenate(values) for name, values in found.items()}
        (live_P, sums), (other_P, other_sums) = self._said(), other._said()
        apart["token_advantages_P"] = np.abs(live_P - other_P)
        for name, one_N, two_N in zip(_SUMS, sums, other_sums, strict=True):
            apart[name] = np.abs(one_N - two_N)
        if isinstance(self.stage.support, ExactSupport):
            states = [hidden_PD.float().cpu().numpy() for hidden_PD in other.asked.hidden_PD]
            apart |= self._states_apart(states)
        return apart

    def _blocks(self) -> Iterator[tuple[slice, Scored]]:
        return scored_blocks(self.stage, self.blocks, self.asked, self.num_ids)

    def _kept(
        self, stored: Row, at: slice, scored: Scored, uniforms_PN: npt.NDArray[Any]
    ) -> tuple[dict[str, F64Array], dict[str, F64Array]]:
        student = student_of(self.asked.row, scored.aligned_PV.device)
        student = StudentTop(student.token_ids_PS[at], student.logprobs_PS[at])
        return kept_apart(self.stage.support, stored, at, scored, student, uniforms_PN[at])

    def _uniforms(self) -> npt.NDArray[Any]:
        key = row_key(self.stage.seed, self.question.sample_id)
        most = getattr(self.stage.support, "max_k", None) or 0
        return uniforms(key, len(self.question.places_P), 1 + most)

    def _said(self) -> tuple[F64Array, list[F64Array]]:
        """Return the advantage of each token that was said, and both models' sums a response."""
        pairs = [
            [scored.of_generated(p).double().cpu().numpy() for p in _both(scored)]
            for _, scored in self._blocks()
        ]
        teacher_P, reference_P = (np.concatenate(values) for values in zip(*pairs, strict=True))
        sums = [sums_of(self.asked.prompted, values) for values in (teacher_P, reference_P)]
        return (teacher_P - reference_P) * self.stage.beta, sums

    def _states_apart(self, states: Sequence[npt.NDArray[Any]]) -> dict[str, F64Array]:
        found = {}
        for name, stored_PD, live in zip(_HIDDEN, states, self.asked.hidden_PD, strict=False):
            live_PD = live.double().cpu().numpy()
            found[name] = over_length(np.asarray(stored_PD) - live_PD, live_PD)
        return found


def _both(scored: Scored) -> tuple[torch.Tensor, torch.Tensor]:
    return scored.aligned_PV, scored.reference_PV
