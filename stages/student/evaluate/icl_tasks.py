"""The numbers of one task, from how a model scored its episodes; no model in here.

Numbers are named; a name is missing where it means nothing for a task:

=============================  ==================================================================
``accuracy``                   mean over draws of demonstrations; a tie is a mistake
``accuracy_deviation``         sample standard deviation over draws
``macro_f1``                   the same of macro-F1, for tasks whose queries share their candidates
``vote_accuracy``              of the majority vote over a query's draws, where there are several
``precision_at_1``, ``_10``    P@k over all episodes, for tasks of more than 10 candidates
``majority_accuracy``          of the commonest gold label, likewise ``majority_macro_f1``
``random_accuracy``            of uniform guessing, likewise ``random_precision_at_10``
``teacher_...``                any of the first seven, of the teacher's cached scores
``candidate_kl``               KL(teacher || student) of P(candidate), nats, mean over episodes
``candidate_agreement``        share of episodes where both prefer one candidate
``best_subset_agreement``      BiAlign's consistency, likewise ``worst_subset_agreement``
``random_subset_agreement``    expected of a random order of subsets
``subset_rank_correlation``    Kendall's tau-b of subsets, mean over episodes
``exact_match``, ``token_f1``  of free answers, mean over draws; ``exact_match_deviation``
``majority_exact_match``       of always giving the commonest answer
=============================  ==================================================================

Dimensions: N = candidates or subsets of an episode.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from schemas.errors import StoreError
from schemas.tables.episodes import split_candidates
from stages.student.evaluate.free_answers import FreeAnswer
from stages.student.evaluate.icl_metrics import (
    accuracy,
    best_and_worst_agree,
    candidate_logprobs,
    exact_match,
    kendall_tau_b,
    kl_divergence,
    macro_f1,
    majority_baseline,
    majority_vote,
    mean_and_spread,
    normalise_answer,
    precision_at,
    predict,
    random_precision,
    rank_of,
    token_f1,
)

STUDENT, TEACHER = "", "teacher_"  # prefixes of the numbers
MANY_CANDIDATES = 10  # P@10 says nothing with as few

Array = npt.NDArray[Any]
Row = Mapping[str, Any]
Numbers = dict[str, float]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Choice:
    """One episode with candidates, these sorted by their token ids so that draws line up.

    ``places_N`` says where each stood in the episode; ``scores`` are [N] arrays by model.
    """

    sample_id: str
    query_id: str
    draw: int
    candidates: bytes
    places_N: Array
    gold: int
    scores: Mapping[str, Array]


def make_choice(row: Row, scores: Mapping[str, Array]) -> Choice:
    """Sort an episode's candidates, and the scores of its models with them."""
    parts = split_candidates(row["candidate_ids_C"], row["candidate_lengths_N"])
    texts = [np.asarray(ids, "<i8").tobytes() for ids in parts]
    places_N = np.asarray(sorted(range(len(texts)), key=lambda n: texts[n]))
    digest = hashlib.blake2b(digest_size=12)
    for place in places_N:
        digest.update(len(texts[place]).to_bytes(8, "little") + texts[place])
    return Choice(
        sample_id=row["sample_id"],
        query_id=row["query_id"],
        draw=row["draw"],
        candidates=digest.digest(),
        places_N=places_N,
        gold=int(np.flatnonzero(places_N == row["gold"])[0]),
        scores={name: np.asarray(array)[places_N] for name, array in scores.items()},
    )


def choice_numbers(choices: Sequence[Choice]) -> Numbers:
    """Return accuracy and its kin of every model, the baselines, and agreement with the teacher."""
    counts = [len(choice.places_N) for choice in choices]
    numbers = _baselines(choices, counts)
    for prefix in choices[0].scores:
        found = _model_numbers(choices, prefix, many=min(counts) > MANY_CANDIDATES)
        numbers |= {prefix + name: value for name, value in found.items()}
    if TEACHER in choices[0].scores:
        numbers |= _candidate_agreement(choices)
    return numbers


def accuracy_by_draw(choices: Sequence[Choice], model: str = STUDENT) -> dict[int, float]:
    """Return a model's accuracy on each draw of demonstrations."""
    return _by_draw(choices, lambda part: accuracy(*_answers(part, model)))


def subset_numbers(rows: Sequence[Row], student_scores: Sequence[Array]) -> Numbers:
    """Return agreement on subsets; ``student_scores`` are [N] log Q of each row's subsets."""
    best, worst, taus, chances = [], [], [], []
    for row, scores_N in zip(rows, student_scores, strict=True):
        at_best, at_worst = best_and_worst_agree(row["ranks_N"], scores_N)
        best.append(at_best)
        worst.append(at_worst)
        taus.append(kendall_tau_b(-row["ranks_N"].astype(np.int64), scores_N))
        chances.append(1 / len(scores_N))
    named: dict[str, Sequence[float | None]] = {
        "best_subset_agreement": best,
        "worst_subset_agreement": worst,
        "subset_rank_correlation": taus,
        "random_subset_agreement": chances,
    }
    known = {name: [v for v in values if v is not None] for name, values in named.items()}
    return {name: float(np.mean(values)) for name, values in known.items() if values}


def generation_numbers(rows: Sequence[Row], answers: Sequence[FreeAnswer]) -> Numbers:
    """Return exact match and word F1 of free answers, over draws."""
    pairs = list(zip(rows, answers, strict=True))
    matches, overlaps = defaultdict(list), defaultdict(list)
    for row, answer in pairs:
        matches[row["draw"]].append(exact_match(answer.gold, answer.predicted))
        overlaps[row["draw"]].append(token_f1(answer.gold, answer.predicted))
    means = [[float(np.mean(v)) for v in found.values()] for found in (matches, overlaps)]
    commonest = Counter(normalise_answer(answer.gold) for answer in answers).most_common(1)[0][1]
    return {
        **_spread_numbers("exact_match", means[0]),
        **_spread_numbers("token_f1", means[1]),
        "majority_exact_match": commonest / len(answers),
    }


def _baselines(choices: Sequence[Choice], counts: Sequence[int]) -> Numbers:
    shared = _share_candidates(choices)
    # Where each query has candidates of its own, the constant answer is a place in the list.
    majority = majority_baseline([c.gold if shared else int(c.places_N[c.gold]) for c in choices])
    numbers = {"majority_accuracy": majority[0], "random_accuracy": random_precision(counts)}
    if shared:
        numbers["majority_macro_f1"] = majority[1]
    if min(counts) > MANY_CANDIDATES:
        numbers["random_precision_at_10"] = random_precision(counts, 10)
    return numbers


def _model_numbers(choices: Sequence[Choice], model: str, *, many: bool) -> Numbers:
    numbers = _spread_numbers("accuracy", list(accuracy_by_draw(choices, model).values()))
    if _share_candidates(choices):
        by_draw = _by_draw(choices, lambda part: macro_f1(*_answers(part, model)))
        numbers |= _spread_numbers("macro_f1", list(by_draw.values()))
    queries = _grouped(choices, lambda choice: choice.query_id)
    if len(choices) > len(queries):
        right = [_vote_is_right(draws, model) for draws in queries.values()]
        numbers["vote_accuracy"] = float(np.mean(right))
    if many:
        ranks = [rank_of(choice.scores[model], choice.gold) for choice in choices]
        numbers |= {f"precision_at_{k}": precision_at(ranks, k) for k in (1, 10)}
    return numbers


def _vote_is_right(draws: Sequence[Choice], model: str) -> bool:
    first = draws[0]
    for other in draws[1:]:
        if (other.candidates, other.gold) != (first.candidates, first.gold):
            raise StoreError(
                f"samples {first.sample_id} and {other.sample_id} are draws of one query "
                f"({first.query_id}) with other candidates or another gold: make the episodes again"
            )
    return majority_vote(np.stack([draw.scores[model] for draw in draws]), first.gold) == first.gold


def _candidate_agreement(choices: Sequence[Choice]) -> Numbers:
    kls, agreed = [], []
    for choice in choices:
        student_N, teacher_N = choice.scores[STUDENT], choice.scores[TEACHER]
        kls.append(kl_divergence(candidate_logprobs(teacher_N), candidate_logprobs(student_N)))
        agreed.append(rank_of(student_N, int(teacher_N.argmax())) == 1)
    return {"candidate_kl": float(np.mean(kls)), "candidate_agreement": float(np.mean(agreed))}


def _answers(choices: Sequence[Choice], model: str) -> tuple[list[int], list[int]]:
    """Return the gold candidates and the predicted ones."""
    golds = [choice.gold for choice in choices]
    return golds, [predict(choice.scores[model], choice.gold) for choice in choices]


def _share_candidates(choices: Sequence[Choice]) -> bool:
    return len({choice.candidates for choice in choices}) == 1


def _by_draw(
    choices: Sequence[Choice], metric: Callable[[Sequence[Choice]], float]
) -> dict[int, float]:
    draws = _grouped(choices, lambda choice: choice.draw)
    return {draw: metric(part) for draw, part in sorted(draws.items())}


def _grouped(items: Sequence[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    groups: dict[Any, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def _spread_numbers(name: str, values: Sequence[float]) -> Numbers:
    spread = mean_and_spread(values)
    numbers = {name: spread.mean}
    if spread.deviation is not None:
        numbers[f"{name}_deviation"] = spread.deviation
    return numbers
