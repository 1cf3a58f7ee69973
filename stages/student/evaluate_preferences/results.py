"""What a preference evaluation reports, put together from scores; no model in here.

Numbers of a student:

=========================  ======================================================================
``reward``                 implicit reward of its responses, mean over prompts;
                           ``reward_per_token`` is the mean over prompts of reward / tokens
``win_rate``               share of prompts where the judge prefers its response to the baseline's,
                           with ``win_rate_low`` and ``win_rate_high``, the 95 % interval
``accuracy``, ``margin``   of its own log p of chosen against rejected responses, as sums;
                           ``..._per_token`` as means over tokens, ``relative_...`` of the log-ratio
                           to the baseline (DPO's implicit reward, arXiv 2305.18290, over its beta)
``cross_entropy``          of the chosen responses, nats per token
``kl_to_baseline``         KL(student || baseline) over the whole vocabulary, mean over all
                           positions of its own responses, nats
``response_tokens``        mean length of its responses, the token that ends them counted
``finished``, ``empty``    shares that ended by themselves, and that did so with their first token
=========================  ======================================================================

A number is missing where it means nothing: the relative ones and the win rate of the baseline.

Dimensions: P = prompts, 2 = chosen and rejected.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.models.causal_lm.implicit_rewards import preference
from stages.student.evaluate_preferences.metrics import (
    WinRate,
    own_preference_numbers,
    relative_preference_numbers,
    response_numbers,
    reward_numbers,
    win_rate,
)
from stages.student.evaluate_preferences.rows import HeldOutPairs

NUM_EXAMPLES = 5
DATA_ROWS = ("chosen", "rejected")

Array = npt.NDArray[Any]
F64Array = npt.NDArray[np.float64]
Numbers = dict[str, float]


@dataclass(frozen=True, slots=True)
class Answered:
    """One student's responses by prompt, and its sums of log p of the data's, [P, 2] nats."""

    responses: Sequence[Array]
    finished: Sequence[bool]
    logprobs_P2: F64Array
    kl_to_baseline: float | None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response."""
        return [len(response) for response in self.responses]


@dataclass(frozen=True, slots=True)
class Rewards:
    """The judge's rewards: [P] of each student's responses, [P, 2] of the data's."""

    beta: float
    cached: bool
    students: Mapping[str, F64Array]
    data_P2: F64Array


@dataclass(frozen=True, slots=True)
class Comparison:
    """How often the judge prefers the responses of ``first`` to those of ``second``."""

    first: str
    second: str
    result: WinRate


@dataclass(frozen=True, slots=True)
class JudgeReport:
    """What the judge makes of the data's own pairs; ``cached`` if its scores of them were."""

    beta: float
    cached: bool
    accuracy: float
    margin: float


@dataclass(frozen=True, slots=True)
class ShownResponse:
    """A response as a person reads it; ``reward`` is None without a judge."""

    text: str
    num_tokens: int
    finished: bool
    reward: float | None


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with the students' responses by name, and the data's."""

    sample_id: str
    prompt: str
    students: Mapping[str, ShownResponse]
    data: Mapping[str, ShownResponse]


@dataclass(frozen=True, slots=True)
class PreferenceReport:
    """Numbers by student and of the data's responses; every pair of students once.

    ``num_missing`` pairs lacked a cached score of the judge, ``num_too_long`` did not fit a window.
    """

    baseline: str | None
    students: Mapping[str, Numbers]
    data: Mapping[str, Numbers]
    judge: JudgeReport | None
    win_rates: tuple[Comparison, ...]
    examples: tuple[Example, ...]
    num_prompts: int
    num_missing: int
    num_too_long: int

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        body: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return body


def make_report(
    held_out: HeldOutPairs,
    answered: Mapping[str, Answered],
    rewards: Rewards | None,
    *,
    baseline: str | None,
    seed: int,
    decode: Callable[[Any], str],
) -> PreferenceReport:
    """Put everything together; ``decode`` turns token ids into text."""
    lengths_P2 = np.array([pair.lengths for pair in held_out.pairs])
    students = {
        name: response_numbers(one.lengths, one.finished)
        | own_preference_numbers(one.logprobs_P2, lengths_P2)
        | ({} if one.kl_to_baseline is None else {"kl_to_baseline": one.kl_to_baseline})
        for name, one in answered.items()
    }
    data = {
        name: response_numbers(
            lengths_P2[:, column].tolist(), [pair.finished[column] for pair in held_out.pairs]
        )
        for column, name in enumerate(DATA_ROWS)
    }
    for name in answered:
        if baseline is not None and name != baseline:
            students[name] |= relative_preference_numbers(
                answered[name].logprobs_P2, answered[baseline].logprobs_P2
            )
    if rewards is not None:
        for name, one in answered.items():
            students[name] |= reward_numbers(rewards.students[name], one.lengths)
            if baseline is not None and name != baseline:
                students[name] |= _win_numbers(rewards, name, baseline, seed)
        for column, name in enumerate(DATA_ROWS):
            data[name] |= reward_numbers(rewards.data_P2[:, column], lengths_P2[:, column].tolist())
    return PreferenceReport(
        baseline=baseline,
        students=students,
        data=data,
        judge=None if rewards is None else _judge_report(rewards),
        win_rates=() if rewards is None else _all_win_rates(rewards, seed),
        examples=_examples(held_out, answered, rewards, seed, decode),
        num_prompts=len(held_out.pairs),
        num_missing=held_out.num_missing,
        num_too_long=held_out.num_too_long,
    )


def _win_numbers(rewards: Rewards, name: str, baseline: str, seed: int) -> Numbers:
    found = win_rate(rewards.students[name], rewards.students[baseline], seed=seed)
    return {"win_rate": found.rate, "win_rate_low": found.low, "win_rate_high": found.high}


def _all_win_rates(rewards: Rewards, seed: int) -> tuple[Comparison, ...]:
    return tuple(
        Comparison(
            first, second, win_rate(rewards.students[first], rewards.students[second], seed=seed)
        )
        for first, second in combinations(rewards.students, 2)
    )


def _judge_report(rewards: Rewards) -> JudgeReport:
    found = preference(*rewards.data_P2.T)
    return JudgeReport(rewards.beta, rewards.cached, found.accuracy, found.margin)


def _examples(
    held_out: HeldOutPairs,
    answered: Mapping[str, Answered],
    rewards: Rewards | None,
    seed: int,
    decode: Callable[[Any], str],
) -> tuple[Example, ...]:
    """Draw a few prompts; special tokens are shown too, as the models saw or wrote them."""
    count = len(held_out.pairs)
    drawn = np.random.default_rng(seed).permutation(count)[:NUM_EXAMPLES]

    def shown(ids: Array, finished: bool, reward: Any) -> ShownResponse:
        known = None if reward is None else float(reward)
        return ShownResponse(decode(ids), len(ids), bool(finished), known)

    examples = []
    for at in sorted(drawn.tolist()):
        pair = held_out.pairs[at]
        students = {
            name: shown(
                one.responses[at],
                one.finished[at],
                None if rewards is None else rewards.students[name][at],
            )
            for name, one in answered.items()
        }
        data = {
            name: shown(
                pair.responses[column],
                pair.finished[column],
                None if rewards is None else rewards.data_P2[at, column],
            )
            for column, name in enumerate(DATA_ROWS)
        }
        examples.append(Example(pair.sample_id, decode(pair.prompt_T), students, data))
    return tuple(examples)
