"""The work of ``answers``: responses that pass the filters, each after its prompt.

Dimensions: T = tokens of a prompt, A = tokens of a response.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.storage.shards import split_of
from schemas.tables.conversations import Conversation
from schemas.tables.episodes import split_candidates
from schemas.tables.prompted.responses import FINISH_REASONS, RESPONSES, Responses
from stages.models.checkpoints.tokenizer import open_tokenizer
from stages.sources.answers.scores import Scores, read_scores
from stages.sources.answers.stage import AnswersStage
from stages.stage import Rejected, StageContext, Work

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Answer:
    ids_A: Array
    finish_reason: str
    mean_logprob: float
    score: float | str  # or why there is none

    @property
    def rank(self) -> float:
        """The higher, the better; of an answer that passes."""
        return self.mean_logprob if isinstance(self.score, str) else self.score


@contextmanager
def open_work(stage: AnswersStage, context: StageContext) -> Iterator[Work]:
    """Open the tokenizer where text is asked about; the work filters one shard."""
    tokenizer: Any = None
    if stage.tokenizer is not None:
        tokenizer = open_tokenizer(context.models[stage.tokenizer].path)
    scores = {} if stage.scores is None else read_scores(stage.scores)

    def work(shard: pa.Table) -> Iterable[list[Conversation | Rejected]]:
        split = split_of(shard)
        for batch in shard.to_batches():
            for row in RESPONSES.rows(batch):
                yield list(_rows(stage, tokenizer, _answers_of(row, scores), row, split))

    yield work


def _rows(
    stage: AnswersStage,
    tokenizer: Any,
    answers: Sequence[_Answer],
    row: Responses,
    split: str,
) -> Iterator[Conversation | Rejected]:
    """Yield what becomes of each response, in order; of ``keep: best`` the others are rejects."""
    reasons = [_reason(stage, tokenizer, answer) for answer in answers]
    for index, answer in enumerate(answers):
        before = zip(answers[:index], reasons, strict=False)
        if not reasons[index] and any(
            not reason and np.array_equal(answer.ids_A, other.ids_A) for other, reason in before
        ):
            reasons[index] = "equal to another response"
    if stage.keep == "best":
        passing = [index for index, reason in enumerate(reasons) if not reason]
        best = max(passing, key=lambda index: answers[index].rank, default=None)
        for index in passing:
            reasons[index] = "" if index == best else "not the best response"
    for answer, reason in zip(answers, reasons, strict=True):
        if reason:
            yield Rejected(row.sample_id, reason)
        else:
            yield _conversation(row, answer, split)


def _answers_of(row: Responses, scores: Scores) -> list[_Answer]:
    ids = split_candidates(row.response_ids_A, row.response_lengths_N)
    logprobs = split_candidates(row.logprobs_A, row.response_lengths_N)
    return [
        _Answer(
            ids_A,
            FINISH_REASONS[int(code)],
            float(np.mean(logprobs_A, dtype=np.float64)),
            scores.get((row.sample_id, number), "no score"),
        )
        for number, (ids_A, logprobs_A, code) in enumerate(
            zip(ids, logprobs, row.finish_reasons_N, strict=True)
        )
    ]


def _reason(stage: AnswersStage, tokenizer: Any, answer: _Answer) -> str:
    """Return the first filter that an answer does not pass, ``""`` if it passes all."""
    num_tokens = len(answer.ids_A)
    if answer.finish_reason not in stage.finish_reasons:
        return f"finish reason {answer.finish_reason}"
    if num_tokens < stage.min_tokens:
        return f"fewer than min_tokens {stage.min_tokens}"
    if stage.max_tokens is not None and num_tokens > stage.max_tokens:
        return f"more than max_tokens {stage.max_tokens}"
    if stage.min_mean_logprob is not None and answer.mean_logprob < stage.min_mean_logprob:
        return f"mean log-prob below min_mean_logprob {stage.min_mean_logprob}"
    if stage.scores is not None and isinstance(answer.score, str):
        return answer.score
    if stage.min_score is not None and answer.rank < stage.min_score:
        return f"score below min_score {stage.min_score}"
    if tokenizer is None:
        return ""
    text = tokenizer.decode(answer.ids_A.tolist(), skip_special_tokens=True)
    if stage.matching is not None and not re.search(stage.matching, text):
        return "text without a match of matching"
    if stage.not_matching is not None and re.search(stage.not_matching, text):
        return "text with a match of not_matching"
    return ""


def _conversation(row: Responses, answer: _Answer, split: str) -> Conversation:
    start = len(row.prompt_ids_T)
    ids_T = np.concatenate([row.prompt_ids_T, answer.ids_A])
    made = Conversation(
        sample_id="",
        split=split,
        source_id=row.sample_id,
        input_ids_T=ids_T,
        scored_S2=np.array([[start, len(ids_T)]], np.int32),
        is_cut=answer.finish_reason == "length",
    )
    return replace(made, sample_id=made.hashed_id)
