"""The work of ``evaluate_preferences``: on held-out pairs, and by the students' own responses.

Every student answers every prompt greedily, and is asked how likely it finds the two responses of
the data. A judge, an aligned teacher and its reference, rewards all responses by its log-ratio (see
``causal_lm.implicit_rewards``); this is the one place where the two are run live. Their scores of
the data's responses come from ``response_logprobs`` tables where such are given. What is reported
is listed in ``results``.

All runs in float32. Two models at most are in memory: the baseline with one student, then the
judge's two in turn. Responses of equal tokens are scored once, so that they tie.

Dimensions: P = prompts, R = responses to each that are scored, 2 = chosen and rejected.
"""

import filecmp
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from schemas.errors import ConfigError, IdentityMismatch
from schemas.storage.files import Folder
from stages.models.causal_lm.end_tokens import answer_ends
from stages.models.causal_lm.greedy_decoding import decode_greedily
from stages.models.causal_lm.implicit_rewards import implicit_rewards
from stages.models.causal_lm.model import load_student, student_vocab_size
from stages.models.causal_lm.response_measures import (
    batches_by_length,
    mean_kl,
    response_logprobs,
    without_repeats,
)
from stages.models.causal_lm.sequence_logprobs import Continuations
from stages.models.checkpoints.checkpoint import CheckpointRecord, write_evaluation
from stages.models.checkpoints.tokenizer import open_tokenizer
from stages.models.checkpoints.tokenizer_identity import num_token_ids
from stages.stage import StepJob
from stages.student.evaluate.positions import device_of
from stages.student.evaluate_preferences.results import (
    Answered,
    PreferenceReport,
    Rewards,
    make_report,
)
from stages.student.evaluate_preferences.rows import HeldOutPairs, read_pairs
from stages.student.evaluate_preferences.stage import PreferenceEvaluationStage
from stages.student.options import TrainOptions

Array = npt.NDArray[Any]
F64Array = npt.NDArray[np.float64]
OnProgress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Judge:
    """Folders of the two models whose log-ratio, times ``beta``, rewards a response."""

    teacher: Path
    reference: Path
    beta: float = 0.1


@dataclass(frozen=True, slots=True)
class PreferenceOptions:
    """How students answer; ``seed`` is that of the bootstrap and of which rows are shown."""

    max_tokens: int = 64
    batch_size: int = 8
    seed: int = 0


def make(stage: PreferenceEvaluationStage, job: StepJob) -> None:
    """Measure the students side by side; ``evaluation.json`` has win rates and examples too."""
    folders = {name: model.path for name, model in job.models.items()}
    judge = None
    if stage.judge is not None:
        teacher, reference = folders[stage.judge.teacher], folders[stage.judge.reference]
        judge = Judge(teacher, reference, stage.judge.beta)
    report = evaluate_preferences(
        {name: folders[name] for name in stage.measured},
        job.tables,
        baseline=stage.baseline,
        judge=judge,
        options=PreferenceOptions(stage.max_tokens, stage.batch_size, stage.seed),
        on_progress=job.said,
    )
    metrics = report.students
    record = CheckpointRecord(fingerprint=job.fingerprint, identity=job.identity, metrics=metrics)
    write_evaluation(job.output, report.as_dict(), record)


def evaluate_preferences(
    students: Mapping[str, Path],
    data: Sequence[Folder],
    *,
    baseline: str | None = None,
    judge: Judge | None = None,
    split: str = "heldout",
    options: PreferenceOptions | None = None,
    on_progress: OnProgress | None = None,
) -> PreferenceReport:
    """Measure students by name on one split; ``baseline`` is the name of one of them.

    ``data`` is ``preference_pairs``, then none or two ``response_logprobs`` about them: of the
    judge's teacher, then of its reference. Raises ConfigError for a judge that is one model twice,
    IdentityMismatch for vocabularies that cannot be compared, and what ``read_pairs`` raises.
    """
    options = options or PreferenceOptions()
    assert baseline is None or baseline in students, "the baseline is measured too"
    if judge and _same_weights(judge.teacher, judge.reference):
        raise ConfigError(
            f"the judge's teacher {judge.teacher} and reference {judge.reference} are one model, "
            f"so every reward would be 0: give the model that was aligned and the one before"
        )
    held_out = read_pairs(
        data,
        split=split,
        models=[*students.values(), *((judge.teacher, judge.reference) if judge else ())],
        max_tokens=options.max_tokens,
        has_judge=judge is not None,
    )
    device = device_of(TrainOptions())
    run = _Run(held_out, options, device, on_progress or (lambda line: None))
    with torch.inference_mode():
        answered = run.answer_all(students, baseline)
        rewards = run.judge_all(answered, judge) if judge else None
    return make_report(
        held_out,
        answered,
        rewards,
        baseline=baseline,
        seed=options.seed,
        decode=open_tokenizer(next(iter(students.values()))).decode,
    )


def _same_weights(first: Path, second: Path) -> bool:
    """Compare weight files byte by byte; two models differ in size, or soon after the start."""
    if first.resolve() == second.resolve():
        return True
    names, others = (
        sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
        for folder in (first, second)
    )
    if names != others or not names:
        return False
    return all(filecmp.cmp(first / name, second / name, shallow=False) for name in names)


@dataclass(frozen=True, slots=True)
class _Run:
    """The pairs every model is measured on, and how."""

    held_out: HeldOutPairs
    options: PreferenceOptions
    device: torch.device
    on_progress: OnProgress

    def answer_all(self, students: Mapping[str, Path], baseline: str | None) -> dict[str, Answered]:
        """Run the students one by one, each beside the baseline."""
        base = self._load(students[baseline]) if baseline is not None else None
        answered = {}
        for name, folder in students.items():
            self.on_progress(f"measuring {name}")
            model = base if base is not None and name == baseline else self._load(folder)
            answered[name] = self._answer(folder, model, base)
        return answered

    def judge_all(self, answered: Mapping[str, Answered], judge: Judge) -> Rewards:
        """Run the judge's models, one after the other."""
        teacher_PR = self._judge_logprobs(answered, judge.teacher, 0)
        reference_PR = self._judge_logprobs(answered, judge.reference, 1)
        rewards_PR = implicit_rewards(teacher_PR, reference_PR, judge.beta)
        return Rewards(
            beta=judge.beta,
            cached=self.held_out.pairs[0].judge_logprobs is not None,
            students=dict(zip(answered, rewards_PR.T, strict=False)),
            data_P2=rewards_PR[:, len(answered) :],
        )

    def _load(self, folder: Path) -> PreTrainedModel:
        return load_student(folder, device=self.device).eval()

    def _answer(
        self, folder: Path, model: PreTrainedModel, base: PreTrainedModel | None
    ) -> Answered:
        pairs, size = self.held_out.pairs, self.options.batch_size
        # Not by generation_config.json, which is no part of a model's identity.
        named = answer_ends(open_tokenizer(folder), model.config.get_text_config())
        ends = sorted({*named, *self.held_out.turn_ends})
        by_pair: dict[int, Array] = {}
        for batch in batches_by_length([len(pair.prompt_T) for pair in pairs], size):
            prompts = [pairs[index].prompt_T for index in batch]
            decoded = decode_greedily(
                model, prompts, ends=ends, max_new_tokens=self.options.max_tokens
            )
            by_pair.update(zip(batch, map(np.asarray, decoded), strict=True))
        responses = [by_pair[index] for index in range(len(pairs))]
        asked = [Continuations.of(pair.prompt_T, pair.responses) for pair in pairs]
        written = [(pair.prompt_T, ids_T) for pair, ids_T in zip(pairs, responses, strict=True)]
        return Answered(
            responses=responses,
            finished=[int(ids_T[-1]) in ends for ids_T in responses],
            logprobs_P2=np.stack(response_logprobs(model, asked, batch_size=size)),
            kl_to_baseline=None if base is None else self._kl(folder, model, base, written),
        )

    def _kl(
        self,
        folder: Path,
        model: PreTrainedModel,
        base: PreTrainedModel,
        written: Sequence[tuple[Array, Array]],
    ) -> float:
        """Return the KL to the baseline; where rows that no token uses differ, without those."""
        sizes = student_vocab_size(model), student_vocab_size(base)
        num_ids = None if sizes[0] == sizes[1] else num_token_ids(folder) or max(sizes)
        largest = max(int(response.max()) for _, response in written)
        if num_ids is not None and max(num_ids - 1, largest) >= min(sizes):
            raise IdentityMismatch(
                f"student {folder} has {sizes[0]} logits and wrote token {largest}, the baseline "
                f"has {sizes[1]}, the tokenizer uses {num_ids} ids: no KL is between them, take "
                f"another baseline"
            )
        return mean_kl(model, base, written, batch_size=self.options.batch_size, num_ids=num_ids)

    def _judge_logprobs(
        self, answered: Mapping[str, Answered], folder: Path, place: int
    ) -> F64Array:
        """Return [P, R] sums of log p: the students' responses in order, then the data's."""
        self.on_progress(f"judging with {folder}")
        model = self._load(folder)
        _refuse_unknown_ids(folder, student_vocab_size(model), answered)
        asked, places_PR, cached_P2 = [], [], []
        for index, pair in enumerate(self.held_out.pairs):
            responses = [one.responses[index] for one in answered.values()]
            if pair.judge_logprobs is None:
                responses += pair.responses
            else:
                cached_P2.append(pair.judge_logprobs[place])
            distinct, places_R = without_repeats(responses)
            asked.append(Continuations.of(pair.prompt_T, distinct))
            places_PR.append(places_R)
        found = response_logprobs(model, asked, batch_size=self.options.batch_size)
        sums_PR = np.stack([sums[at] for sums, at in zip(found, places_PR, strict=True)])
        return np.concatenate([sums_PR, cached_P2], axis=1) if cached_P2 else sums_PR


def _refuse_unknown_ids(folder: Path, num_logits: int, answered: Mapping[str, Answered]) -> None:
    for name, one in answered.items():
        largest = max(int(response.max()) for response in one.responses)
        if largest >= num_logits:
            raise IdentityMismatch(
                f"student {name} wrote token {largest}, the judge {folder} has {num_logits} "
                f"tokens: take a judge whose vocabulary holds the student's"
            )
