"""What an audit asks of a live teacher about rows of ``teacher_logits``, in every encoding.

The live teacher's states go through its head to the whole distribution, position by position.

Dimensions: P = compared positions, V = vocabulary, K = kept entries, D = hidden width.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from schemas.distribution import row_key, uniforms, unpack_top_k, weighted_tokens
from schemas.errors import StoreError
from schemas.rounded_states import hidden_states
from schemas.storage.manifest import read_manifest
from schemas.storage.shard_cache import local_files
from stages.models.causal_lm.language_head import LanguageHead
from stages.signals.scoring.agreement import (
    MASS,
    NATS,
    Answer,
    Ask,
    Compared,
    F64Array,
    Measure,
    Question,
    Row,
    beyond_float16,
    beyond_mantissa,
    beyond_steps,
    of_other_shape,
    over_length,
)
from stages.signals.scoring.encoding import measure
from stages.signals.scoring.possible_draw import Entries, draw_apart
from stages.signals.scoring.states import States
from stages.signals.teacher_logits.calibration import read_calibration
from stages.signals.teacher_logits.questions import questions
from stages.signals.teacher_logits.stage import (
    ExactEncoding,
    TeacherLogitsStage,
    ThresholdEncoding,
    TopKEncoding,
)
from stages.signals.teacher_logits.work import open_teacher
from stages.stage import Rejected, StageContext

__all__ = ["Live", "measures", "open_live", "questions"]

Array = npt.NDArray[Any]
_BLOCK_BYTES = 16 << 20  # of distributions in float64, several of which are held
_STATE = {"float32": 2e-4, "float16": 2e-3, "bfloat16": 1.5e-2}


def measures(stage: TeacherLogitsStage) -> dict[str, Measure]:
    """Return what is compared at each position, by name."""
    found = {
        "next_token_logprobs_P": Measure("nats", "next-token log-prob", NATS),
        "entropies_P": Measure("nats", "entropy", NATS),
    }
    match stage.encoding:
        case ThresholdEncoding():
            found["head"] = Measure("probability", "kept head", MASS)
            found["tail"] = Measure("probability", "sampled tail", MASS)
        case TopKEncoding():
            found["logprobs_PK"] = Measure("nats", "log-prob of a kept token", NATS)
            found["kept"] = Measure("probability", "choice of the kept tokens", MASS)
            found["rest_logprobs_P"] = Measure("probability", "mass of the rest", MASS)
        case ExactEncoding():
            found["hidden_PD"] = Measure("of its length", "hidden state", _STATE)
            found["head"] = Measure("probability", "distribution by the stored head", MASS)
    return found


@contextmanager
def open_live(stage: TeacherLogitsStage, context: StageContext) -> Iterator[Ask]:
    """Start the teacher in the engine that the context's model names; it writes nothing.

    Raises StoreError where the table lacks what its rows are read with.
    """
    if stage.mean_k is not None:
        found = read_calibration(context.folder)
        if found is None:
            raise StoreError(f"{context.folder} has no calibration.json, which says its tau")
        known = {"tau": found.tau, "mean_k": None}
        encoding = stage.encoding.model_copy(update=known)
        stage = stage.model_copy(update={"encoding": encoding})
    stored_head = None
    if isinstance(stage.encoding, ExactEncoding):
        files = read_manifest(context.folder).files
        stored_head = LanguageHead.load(local_files(context.folder, files), device="cpu")
    with open_teacher(stage, context) as teacher:

        def ask(asked: Sequence[Question]) -> Iterable[Answer | Rejected]:
            rows = teacher.states(pa.concat_tables([question.rows for question in asked]))
            for question, states in zip(asked, rows, strict=True):
                if isinstance(states, Rejected):
                    yield states
                else:
                    yield Live(stage, question, states, teacher.head, stored_head)

        yield ask


@dataclass(frozen=True, slots=True)
class Live:
    """A live teacher's states of one row, and the head that makes distributions of them."""

    stage: TeacherLogitsStage
    question: Question
    states: States
    head: LanguageHead
    stored_head: LanguageHead | None = None

    def beside(self, stored: Row) -> Compared:
        """Compare with the stored row: each of its columns, and what its encoding leaves out."""
        found = {
            "first_target": int(stored["first_target"]),
            "number of positions": len(stored["next_token_logprobs_P"]),
        }
        if (other := of_other_shape(self.question, found)) is not None:
            return other
        drawn = self._drawn(stored)
        parts = [self._beside(stored, drawn, at, probs) for at, probs in self._blocks()]
        joined = [
            {name: np.concatenate([part[kind][name] for part in parts]) for name in parts[0][kind]}
            for kind in range(3)
        ]
        places_P = self.question.places_P
        return Compared(
            sample_id=self.question.sample_id,
            places_P=places_P,
            apart=joined[0],
            truncation=joined[1],
            stored_P=np.asarray(stored["entropies_P"], np.float64)[places_P],
            live_P=joined[2]["entropies_P"],
        )

    def _beside(
        self, stored: Row, drawn: "_Drawn | None", at: slice, live: "_Probs"
    ) -> tuple[dict[str, F64Array], dict[str, F64Array], dict[str, F64Array]]:
        places_P = self.question.places_P[at]
        encoding = self.stage.encoding
        beyond = beyond_mantissa if isinstance(encoding, ThresholdEncoding) else beyond_float16
        named = {
            "next_token_logprobs_P": live.next_logprobs_P,
            "entropies_P": live.entropies_P,
        }
        apart = {name: beyond(stored[name][places_P], values) for name, values in named.items()}
        match encoding:
            case ThresholdEncoding(tau=tau):
                assert drawn is not None
                most = encoding.most(self.head.vocab_size)
                entries, uniforms_PN = drawn.entries.at(places_P), drawn.uniforms_PN[places_P]
                apart |= draw_apart(entries, live.probs_PV, uniforms_PN, tau=tau, most=most)
                weights_PK = drawn.weights_PK[places_P] * entries.is_kept_PK
                truncation = _left_out(drawn.ids_PK[places_P], weights_PK, live)
            case TopKEncoding():
                ids_PK = np.asarray(stored["token_ids_PK"][places_P], np.int64)
                kept = stored["logprobs_PK"][places_P], stored["rest_logprobs_P"][places_P]
                apart |= _top_k_apart(ids_PK, *kept, live)
                weights_PK, rest_P = unpack_top_k(*kept)
                truncation = _left_out(ids_PK, weights_PK, live, rest_P)
            case ExactEncoding():
                hidden_PD = hidden_states(stored)[places_P]
                states_PD = self.states.hidden_PD[at].float().cpu().numpy()
                if (step := stored.get("hidden_step")) is None:
                    missed_PD = beyond_float16(hidden_PD, states_PD)
                else:
                    missed_PD = beyond_steps(hidden_PD, states_PD, step)
                apart["hidden_PD"] = over_length(missed_PD, states_PD)
                assert self.stored_head is not None
                # Rounded as the stored ones are, by the live head: what is left is the stored head.
                logits = self.stored_head.logits(torch.from_numpy(hidden_PD)).double()
                rounded = self.head.logits(torch.from_numpy(hidden_PD))
                probs_PV = logits.softmax(dim=1).numpy()
                rounded_PV = rounded.double().softmax(dim=1).cpu().numpy()
                apart["head"] = np.abs(probs_PV - rounded_PV).sum(axis=1)
                truncation = {"kl": _kl(live.probs_PV, probs_PV)}
        return apart, truncation, {"entropies_P": live.entropies_P}

    def _drawn(self, stored: Row) -> "_Drawn | None":
        """Lay out a sampled row once, not for each block of it; None: it is of no sample."""
        if not isinstance(self.stage.encoding, ThresholdEncoding):
            return None
        uniforms_PN = self._uniforms(stored, self.stage.encoding.most(self.head.vocab_size))
        return _Drawn(Entries.of(stored), uniforms_PN, *weighted_tokens(stored))

    def _uniforms(self, stored: Row, most: int) -> Array:
        key = row_key(self.stage.seed, self.question.sample_id)
        return uniforms(key, len(stored["next_token_logprobs_P"]), most + 1)

    def beside_live(self, other: "Live", stored: Row) -> dict[str, F64Array]:
        """Return how far two passes are apart: what a sound row's differences stay below."""
        parts = []
        for (at, one), (_, two) in zip(self._blocks(), other._blocks(), strict=True):
            total_P = np.abs(one.probs_PV - two.probs_PV).sum(axis=1)
            part = dict.fromkeys(("head", "tail", "kept", "rest_logprobs_P"), total_P)
            part["next_token_logprobs_P"] = np.abs(one.next_logprobs_P - two.next_logprobs_P)
            part["entropies_P"] = np.abs(one.entropies_P - two.entropies_P)
            if isinstance(self.stage.encoding, TopKEncoding):
                ids_PK = np.asarray(stored["token_ids_PK"], np.int64)[self.question.places_P[at]]
                logs = [np.take_along_axis(p.logprobs_PV, ids_PK, axis=1) for p in (one, two)]
                part["logprobs_PK"] = np.abs(logs[0] - logs[1]).max(axis=1)
            if isinstance(self.stage.encoding, ExactEncoding):
                a_PD, b_PD = (x.states.hidden_PD[at].double().cpu().numpy() for x in (self, other))
                part["hidden_PD"] = over_length(a_PD - b_PD, a_PD)
            parts.append(part)
        names = measures(self.stage)
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _blocks(self) -> Iterator[tuple[slice, "_Probs"]]:
        """Yield the distributions of a few positions at a time, float64."""
        targets_P = torch.from_numpy(self.states.asked.targets_P)
        size = max(1, _BLOCK_BYTES // (8 * self.head.vocab_size))
        for start in range(0, len(targets_P), size):
            at = slice(start, min(start + size, len(targets_P)))
            logits_PV = self.head.logits(self.states.hidden_PD[at])
            yield at, _Probs.of(logits_PV, targets_P[at].to(logits_PV.device))


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A sampled row: its entries, the uniforms of its draw, its tokens with their weights."""

    entries: Entries
    uniforms_PN: Array
    ids_PK: Array
    weights_PK: Array


@dataclass(frozen=True, slots=True)
class _Probs:
    """A live teacher's distributions at some positions, float64."""

    probs_PV: F64Array
    next_logprobs_P: F64Array
    entropies_P: F64Array

    @classmethod
    def of(cls, logits_PV: Tensor, targets_P: Tensor) -> "_Probs":
        found = measure(logits_PV, targets_P)
        probs_PV = found.exp_PV.double()
        probs_PV /= probs_PV.sum(dim=1, keepdim=True)
        columns = probs_PV, found.next_token_logprobs_P.double(), found.entropies_P.double()
        return cls(*(values.cpu().numpy() for values in columns))

    @property
    def logprobs_PV(self) -> F64Array:
        return np.asarray(np.log(np.maximum(self.probs_PV, 1e-300)))


def _top_k_apart(
    ids_PK: Array, logprobs_PK: Array, rest_P: Array, live: _Probs
) -> dict[str, F64Array]:
    """Return how far kept log-probs, the choice of the K and the mass of the rest are from live."""
    held_PK = np.take_along_axis(live.probs_PV, ids_PK, axis=1)
    others_PV = live.probs_PV.copy()
    np.put_along_axis(others_PV, ids_PK, 0.0, axis=1)
    logs_PK = np.log(np.maximum(held_PK, 1e-300))
    low = np.asarray(rest_P, np.float16)
    spacing_P = np.spacing(np.abs(low)).astype(np.float64) / 2
    mass_P, wide_P = others_PV.sum(axis=1), np.exp(low.astype(np.float64))
    missed_P = np.abs(mass_P - wide_P) - np.maximum(mass_P, wide_P) * spacing_P
    return {
        "logprobs_PK": beyond_float16(logprobs_PK, logs_PK).max(axis=1),
        "kept": np.maximum(others_PV.max(axis=1) - held_PK.min(axis=1), 0.0),
        "rest_logprobs_P": np.maximum(missed_P, 0.0),
    }


def _left_out(
    ids_PK: Array, weights_PK: Array, live: _Probs, rest_P: Array | None = None
) -> dict[str, F64Array]:
    """Return what an encoding leaves out of the live distribution, at each position.

    ``kept mass`` is that of the kept tokens; ``cross-entropy error`` how far the cross-entropy of
    the encoding is from that of the whole, both against the live teacher itself, in nats.
    """
    ids_PK = np.asarray(ids_PK, np.int64)
    weights_PK = np.asarray(weights_PK, np.float64)
    held_PK = np.take_along_axis(live.probs_PV, ids_PK, axis=1)
    cross_P = -(weights_PK * np.log(np.maximum(held_PK, 1e-300))).sum(axis=1)
    kept_P = np.where(weights_PK > 0, held_PK, 0.0).sum(axis=1)
    if rest_P is not None:
        cross_P -= rest_P * np.log(np.maximum(1.0 - kept_P, 1e-12))
    return {"kept mass": kept_P, "cross-entropy error": cross_P - live.entropies_P}


def _kl(p_PV: F64Array, q_PV: F64Array) -> F64Array:
    logs_PV = np.log(np.maximum(p_PV, 1e-300)) - np.log(np.maximum(q_PV, 1e-300))
    return np.asarray((p_PV * logs_PV).sum(axis=1))
