"""Preference pairs with every signal of two tiny teachers, for the tests of the preference losses.

Teachers, students and responses are random; scores come from plain float64 forwards, one sequence
at a time, and share nothing with the code under test.

Dimensions: P = response tokens of a row, V = vocabulary, K = kept tokens.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from schemas.distribution import quantise_sticks, uniforms
from schemas.sample_id import sample_id_of
from schemas.storage.files import sha256_of
from schemas.storage.manifest import read_manifest, write_manifest
from schemas.tables.advantages import (
    HEAD_FOLDERS,
    SUPPORTS,
    ExactAdvantages,
    ReleasedAdvantages,
    ThresholdAdvantages,
    UnionAdvantages,
)
from schemas.tables.preference_pairs import PREFERENCE_PAIRS, PreferencePair
from schemas.tables.response_logprobs import RESPONSE_LOGPROBS, ResponseLogprobs
from schemas.tables.responses import RESPONSES, Responses
from schemas.tables.teacher_logits import ENCODINGS, ExactLogits, ThresholdLogits, TopKLogits
from stages.models.causal_lm.language_head import LanguageHead
from stages.signals.scoring.encoding import measure, threshold_sample, top_k
from tests.cached_data import VOCAB_SIZE, K, save_model, write_table

END = 0
BETA = 0.5
KEPT = 6
WIDTH = 32
HEADS = HEAD_FOLDERS


@dataclass(frozen=True)
class PreferenceData:
    """Folders of an aligned teacher, its reference, a student and the tables between them."""

    root: Path

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def reference(self) -> Path:
        return self.root / "reference"

    @property
    def student(self) -> Path:
        return self.root / "student"

    @property
    def pairs(self) -> Path:
        return self.root / "pairs"

    def dckd(self, encoding: str) -> list[Path]:
        return [self.pairs, self.root / f"signals_{encoding}"]

    @property
    def dpo(self) -> list[Path]:
        return [self.pairs, self.root / "reference_logprobs"]

    def adpa(self, support: str) -> list[Path]:
        return [self.pairs, self.root / "responses", self.root / f"advantages_{support}"]


def make_preference_data(root: Path) -> PreferenceData:
    """Write three models, pairs, responses and every signal about them."""
    data = PreferenceData(root)
    for seed, folder in enumerate((data.teacher, data.reference, data.student), 1):
        save_model(folder, seed=seed, num_layers=3 - seed // 2)
    pairs = make_pairs()
    teacher, reference, student = (
        wide_model(folder) for folder in (data.teacher, data.reference, data.student)
    )
    splits = {pair.sample_id: pair.split for pair in pairs}

    def write(name: str, bound: Any, rows: Sequence[Any], side_files: tuple[str, ...] = ()) -> None:
        write_table(
            root / name, bound, rows[::-1], data.teacher, splits=splits, side_files=side_files
        )

    write("pairs", PREFERENCE_PAIRS.bind(vocab_size=VOCAB_SIZE), pairs[::-1])
    sizes = {"K": K, "D": WIDTH, "R": WIDTH}
    for encoding, table in ENCODINGS.items():
        head = _save_heads(root / f"signals_{encoding}", data, encoding, single=True)
        rows = [signals_of(teacher, pair, encoding) for pair in pairs]
        write(f"signals_{encoding}", table.bind(vocab_size=VOCAB_SIZE, sizes=sizes), rows, head)
    scores = [reference_of(reference, pair) for pair in pairs]
    write("reference_logprobs", RESPONSE_LOGPROBS.bind(vocab_size=VOCAB_SIZE), scores)
    answers = [responses_of(student, pair) for pair in pairs]
    write("responses", RESPONSES.bind(vocab_size=VOCAB_SIZE, sizes=sizes), answers)
    for support, table in SUPPORTS.items():
        heads = _save_heads(root / f"advantages_{support}", data, support, single=False)
        kept = [advantages_of(teacher, reference, row, support) for row in answers]
        bound: Any = table.bind(vocab_size=VOCAB_SIZE, sizes={**sizes, "K": KEPT})
        write(f"advantages_{support}", bound, kept, heads)
        folder = root / f"advantages_{support}"
        config = {"config": {"beta": BETA if support != "as_released" else 1.0}}
        write_manifest(folder, replace(read_manifest(folder), identity=config))
    return data


def wide_model(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def _save_heads(
    folder: Path, data: PreferenceData, variant: str, *, single: bool
) -> tuple[str, ...]:
    """Lay heads beside an ``exact`` table, as the stages do."""
    if variant != "exact":
        return ()
    places = [(folder, data.teacher)]
    if not single:
        places = [(folder / HEADS[0], data.teacher), (folder / HEADS[1], data.reference)]
    for place, model in places:
        place.mkdir(parents=True, exist_ok=True)
        LanguageHead.from_model_folder(model, device="cpu", dtype=torch.float32).save(place)
    files = [path for path in sorted(folder.rglob("head.*")) if sha256_of(path)]
    return tuple(str(path.relative_to(folder)) for path in files)


def make_pairs() -> list[PreferencePair]:
    """Mixed lengths; most responses end, some were cut; the last quarter is held out."""
    rng = np.random.default_rng(5)

    def tokens(low: int, high: int) -> list[int]:
        ids: list[int] = rng.integers(1, VOCAB_SIZE, rng.integers(low, high + 1)).tolist()
        return ids

    pairs = []
    for index in range(16):
        prompt, ends = tokens(2, 9), (index % 3 != 1, index % 4 != 2)
        sides = [[*tokens(1, 7), *([END] if end else [])] for end in ends]
        cuts = np.cumsum([0, len(prompt), *map(len, sides)]).tolist()
        spans = list(pairwise(cuts))
        pairs.append(
            PreferencePair(
                sample_id=sample_id_of(np.array([*prompt, *sides[0], *sides[1]]), spans),
                split="train" if index < 12 else "heldout",
                prompt_ids_T=np.array(prompt),
                chosen_ids_C=np.array(sides[0]),
                rejected_ids_R=np.array(sides[1]),
                chosen_finished=ends[0],
                rejected_finished=ends[1],
            )
        )
    return pairs


def sides_of(pair: PreferencePair) -> list[Any]:
    return [pair.chosen_ids_C, pair.rejected_ids_R]


def split_responses(row: Any) -> list[Any]:
    return np.split(row.response_ids_A, np.cumsum(row.response_lengths_N)[:-1])


def response_logits(model: Any, prompt_T: Any, response: Any) -> Tensor:
    """[P, V]: the logits that predict each token of a response, one whole sequence a forward."""
    ids = [*map(int, prompt_T), *map(int, response)]
    logits_TV: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits_TV[len(prompt_T) - 1 : -1].double()


def response_logprobs(model: Any, prompt_T: Any, response: Any) -> Tensor:
    return response_logits(model, prompt_T, response).log_softmax(-1)


def gathered(logprobs_PV: Tensor, response: Any) -> Tensor:
    picked: Tensor = logprobs_PV[range(len(response)), [int(token) for token in response]]
    return picked


@torch.no_grad()
def response_states(model: Any, prompt_T: Any, response: Any) -> Tensor:
    """[P, D] final hidden states, after the last norm."""
    ids = torch.tensor([[*map(int, prompt_T), *map(int, response)]])
    hidden_TD: Tensor = model.model(input_ids=ids).last_hidden_state[0]
    return hidden_TD[len(prompt_T) - 1 : -1]


@torch.no_grad()
def signals_of(model: Any, pair: PreferencePair, encoding: str) -> Any:
    """One ``teacher_logits`` row of both responses, chosen first."""
    sides = sides_of(pair)
    logits_PV = torch.cat([response_logits(model, pair.prompt_ids_T, side) for side in sides])
    targets_P = torch.from_numpy(np.concatenate(sides).astype(np.int64))
    measured = measure(logits_PV.float(), targets_P)
    common: dict[str, Any] = {
        "sample_id": pair.sample_id,
        "first_target": len(pair.prompt_ids_T),
        "next_token_logprobs_P": measured.next_token_logprobs_P.numpy(),
        "entropies_P": measured.entropies_P.numpy(),
    }
    if encoding == "exact":
        states = [response_states(model, pair.prompt_ids_T, side) for side in sides]
        return ExactLogits(hidden_PD=torch.cat(states).numpy(), **common)
    if encoding == "top_k":
        kept = top_k(measured, k=K)
        return TopKLogits(
            token_ids_PK=kept.token_ids_PK.numpy(),
            logprobs_PK=kept.logprobs_PK.numpy(),
            rest_logprobs_P=kept.rest_logprobs_P.numpy(),
            **common,
        )
    draws_PN = uniforms(int(pair.sample_id[:8], 16), len(targets_P), K + 1)
    sample = threshold_sample(measured, torch.from_numpy(draws_PN[:, 0].copy()), k=K)
    codes_PK = quantise_sticks(sample.fractions_PK.numpy(), draws_PN[:, 1:])
    num_head_P = sample.num_head_P.numpy()
    return ThresholdLogits(
        token_ids_PK=sample.token_ids_PK.numpy(),
        num_head_P=num_head_P.astype(np.uint8),
        head_codes_E=codes_PK[np.arange(K) < num_head_P[:, None]],
        **common,
    )


@torch.no_grad()
def reference_of(model: Any, pair: PreferencePair) -> ResponseLogprobs:
    sides = sides_of(pair)
    scores = [
        gathered(response_logprobs(model, pair.prompt_ids_T, side), side).sum() for side in sides
    ]
    return ResponseLogprobs(
        sample_id=pair.sample_id,
        response_logprobs_N=np.array(scores, np.float32),
        response_num_tokens_N=np.array([len(side) for side in sides], np.int32),
    )


@torch.no_grad()
def responses_of(model: Any, pair: PreferencePair) -> Responses:
    """One response, or two, of random tokens: what is scored need not have been likely."""
    rng = np.random.default_rng(int(pair.sample_id[:8], 16))
    count = 1 + int(rng.integers(2))
    ends = [bool(rng.integers(2)) for _ in range(count)]
    drawn = [
        [*rng.integers(1, VOCAB_SIZE, rng.integers(1, 6)), *([END] if end else [])] for end in ends
    ]
    parts = [response_logprobs(model, pair.prompt_ids_T, response) for response in drawn]
    own = [gathered(part, response) for part, response in zip(parts, drawn, strict=True)]
    top = torch.cat(parts).topk(K, dim=-1)
    return Responses(
        sample_id=pair.sample_id,
        prompt_ids_T=pair.prompt_ids_T,
        response_ids_A=np.concatenate(drawn),
        response_lengths_N=np.array([len(response) for response in drawn], np.int32),
        finish_reasons_N=np.array(ends, np.uint8),
        logprobs_A=torch.cat(own).numpy(),
        top_ids_AK=top.indices.numpy(),
        top_logprobs_AK=top.values.numpy(),
    )


@torch.no_grad()
def advantages_of(teacher: Any, reference: Any, row: Responses, support: str) -> Any:
    """One ``advantages`` row by the definitions."""
    responses = split_responses(row)
    models = teacher, reference
    logprobs = [
        torch.cat([response_logprobs(model, row.prompt_ids_T, r) for r in responses])
        for model in models
    ]
    dense_PV = BETA * (logprobs[0] - logprobs[1])
    common = _common(row, responses, logprobs, dense_PV)
    if support == "exact":
        hidden = [
            torch.cat([response_states(model, row.prompt_ids_T, r) for r in responses]).numpy()
            for model in models
        ]
        return ExactAdvantages(teacher_hidden_PD=hidden[0], reference_hidden_PR=hidden[1], **common)
    if support == "union_top_k":
        return _union(logprobs, dense_PV, row, common)
    ids_PK = logprobs[0].topk(KEPT, dim=-1).indices
    if support == "as_released":
        return ReleasedAdvantages(
            token_ids_PK=ids_PK.numpy(), advantages_PK=_released(logprobs, ids_PK), **common
        )
    # Half of the kept tokens are sure, the others are drawn evenly from all that is left.
    sure_PK, rest = ids_PK[:, : KEPT // 2], VOCAB_SIZE - KEPT // 2
    rng = np.random.default_rng(7)
    drawn = [
        rng.choice(np.setdiff1d(np.arange(VOCAB_SIZE), sure), KEPT - KEPT // 2, replace=False)
        for sure in sure_PK.numpy()
    ]
    ids_PK = torch.cat([sure_PK, torch.from_numpy(np.stack(drawn))], dim=1)
    inclusions = np.ones(KEPT)
    inclusions[KEPT // 2 :] = (KEPT - KEPT // 2) / rest
    return ThresholdAdvantages(
        token_ids_PK=ids_PK.numpy(),
        advantages_PK=dense_PV.gather(1, ids_PK).numpy(),
        log_inclusions_PK=np.tile(np.log(inclusions), (len(ids_PK), 1)),
        **common,
    )


def _common(
    row: Responses, responses: Sequence[Any], logprobs: Sequence[Tensor], dense_PV: Tensor
) -> dict[str, Any]:
    cuts = np.cumsum(row.response_lengths_N)[:-1]
    own = [gathered(part, row.response_ids_A).numpy() for part in logprobs]
    sums = [np.array([piece.sum() for piece in np.split(part, cuts)]) for part in own]
    return {
        "sample_id": row.sample_id,
        "token_advantages_P": gathered(dense_PV, row.response_ids_A).numpy(),
        "teacher_logprobs_N": sums[0],
        "reference_logprobs_N": sums[1],
    }


def _union(
    logprobs: Sequence[Tensor], dense_PV: Tensor, row: Responses, common: dict[str, Any]
) -> UnionAdvantages:
    kept, rest = [], []
    for position in range(len(dense_PV)):
        tops = [part[position].topk(2).indices.tolist() for part in logprobs]
        ids = sorted({*tops[0], *tops[1], *row.top_ids_AK[position, :2].tolist()})
        kept.append(ids)
        left = torch.ones(VOCAB_SIZE, dtype=torch.bool)
        left[ids] = False
        masses = [part[position][left].exp().sum().log() for part in logprobs]
        rest.append(float(BETA * (masses[0] - masses[1])))
    values = [float(dense_PV[p, token]) for p, ids in enumerate(kept) for token in ids]
    return UnionAdvantages(
        num_entries_P=np.array([len(ids) for ids in kept], np.uint16),
        token_ids_E=np.concatenate(kept),
        advantages_E=np.array(values),
        rest_advantages_P=np.array(rest),
        **common,
    )


def _released(logprobs: Sequence[Tensor], ids_PK: Tensor) -> Any:
    """log(p/q) on the aligned teacher's likeliest; a q outside its own likeliest is floored."""
    found = np.zeros(tuple(ids_PK.shape))
    for position, ids in enumerate(ids_PK.tolist()):
        p, q = (part[position].exp() for part in logprobs)
        known = set(q.topk(KEPT).indices.tolist())
        floor = max(float(p[ids].min()), 1e-7)
        found[position] = [
            float(torch.log(p[token] / (q[token] if token in known else floor))) for token in ids
        ]
    return found


def without_teachers(data: PreferenceData, folder: Path) -> PreferenceData:
    """Return a copy that holds neither teacher."""
    shutil.copytree(data.root, folder)
    for name in ("teacher", "reference"):
        shutil.rmtree(folder / name)
    return PreferenceData(folder)
