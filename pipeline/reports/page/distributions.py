"""What a table's rows measure, by name: the numbers that its charts are drawn of.

Dimensions: P = scored positions, K = kept entries, N = responses, subsets or candidates.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.reports.page.sampled_rows import SampledRow
from schemas.distribution import unpack_top_k, weighted_tokens
from schemas.tables.prompted.advantages import UnionAdvantages
from schemas.tables.teacher_logits import (
    ExactLogits,
    RoundedLogits,
    TauLogits,
    ThresholdLogits,
    TopKLogits,
)

F64Array = npt.NDArray[np.float64]
BINS = 32


@dataclass(frozen=True, slots=True)
class Distribution:
    """Counts of values in bins of equal width: bin i is ``[edges[i], edges[i + 1])``.

    ``quantiles`` are the least, 5 %, median, 95 % and the largest; ``is_whole`` says that values
    are whole numbers, of which each bin then holds one or more.
    """

    name: str
    unit: str
    num_values: int
    mean: float
    quantiles: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    is_whole: bool


# Name, unit, and what is measured in a row.
Measure = tuple[str, str, Callable[[SampledRow], Any]]


def distributions_of(table: str, rows: Iterable[SampledRow]) -> list[Distribution]:
    """Return the distribution of each thing that rows of ``table`` measure, if they have it."""
    rows = list(rows)
    found = []
    for name, unit, measure in MEASURES.get(table, ()):
        parts = [np.atleast_1d(np.asarray(measure(row), np.float64)) for row in rows]
        values = np.concatenate([np.zeros(0), *parts])
        values = values[np.isfinite(values)]
        if len(values):
            found.append(distribution(name, unit, values))
    return found


def distribution(name: str, unit: str, values: F64Array) -> Distribution:
    """Count finite values, at least one, in at most ``BINS`` bins."""
    low, high = float(values.min()), float(values.max())
    is_whole = bool((values == np.round(values)).all())
    if is_whole:
        width = max(int(np.ceil((high - low + 1) / BINS)), 1)
        edges = np.arange(low, high + width + 1, width)
    else:
        edges = np.linspace(low, high, BINS + 1) if low < high else np.array([low, low + 1e-6])
    counts, edges = np.histogram(values, edges)
    quantiles = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    return Distribution(
        name,
        unit,
        len(values),
        float(values.mean()),
        tuple(quantiles.tolist()),
        tuple(edges.tolist()),
        tuple(counts.tolist()),
        is_whole,
    )


def kept_weights(row: Any) -> tuple[Any, Any] | None:
    """Return the ids and weights [P, K] of a row of ``teacher_logits``; None: it keeps all.

    Weights of the sampled tail of ``threshold`` rows stand for the tokens that were not drawn too.
    A place without an entry has weight 0.
    """
    if isinstance(row, ExactLogits | RoundedLogits):
        return None
    if isinstance(row, TopKLogits):
        return row.token_ids_PK, unpack_top_k(row.logprobs_PK, row.rest_logprobs_P)[0]
    return weighted_tokens(asdict(row))


def _kept_mass(sampled: SampledRow) -> Any:
    """Return the mass [P] of entries that are kept with their own probability."""
    row = sampled.row
    found = kept_weights(row)
    if found is None:
        return []
    weights_PK = np.asarray(found[1], np.float64)
    if isinstance(row, ThresholdLogits | TauLogits):
        weights_PK = weights_PK * (np.arange(weights_PK.shape[1]) < row.num_head_P[:, None])
    return np.minimum(weights_PK.sum(axis=1), 1.0)


def _num_kept(sampled: SampledRow) -> Any:
    row = sampled.row
    if isinstance(row, TauLogits):
        return row.num_head_P.astype(int) + row.num_tail_P
    counts = getattr(row, "num_entries_P", None)
    return [] if counts is None else counts


def _kept_advantages(sampled: SampledRow) -> Any:
    row = sampled.row
    if isinstance(row, UnionAdvantages):
        return row.advantages_E
    return np.ravel(getattr(row, "advantages_PK", []))


def _lead(sampled: SampledRow) -> Any:
    """Return how much the best of a row's scores is above the worst."""
    scores = np.asarray(sampled.row.answer_logprobs_N, np.float64)
    return scores.max() - scores.min()


def _gold_rank(sampled: SampledRow) -> Any:
    """Return the rank of the right candidate by log-prob a token, 1 the best."""
    gold = getattr(sampled.source, "gold", -1)
    if gold < 0:
        return []
    row = sampled.row
    scores = np.asarray(row.candidate_logprobs_N, np.float64) / row.candidate_num_tokens_N
    return 1 + int((scores > scores[gold]).sum())


def _margin(sampled: SampledRow) -> Any:
    """Return log p(chosen) - log p(rejected) of a pair."""
    scores = np.asarray(sampled.row.response_logprobs_N, np.float64)
    return scores[0] - scores[1] if hasattr(sampled.source, "chosen_ids_C") else []


def _log_ratios(sampled: SampledRow) -> Any:
    return sampled.row.teacher_logprobs_N - sampled.row.reference_logprobs_N


def _tokens(sampled: SampledRow) -> Any:
    return sampled.row.num_tokens


def _scored(sampled: SampledRow) -> Any:
    return sampled.row.num_positions


MEASURES: Mapping[str, tuple[Measure, ...]] = {
    "documents": (("tokens of a row", "tokens", _tokens),),
    "conversations": (
        ("tokens of a row", "tokens", _tokens),
        ("scored tokens of a row", "tokens", _scored),
    ),
    "episodes": (
        ("tokens of a row", "tokens", _tokens),
        ("demonstrations", "", lambda sampled: len(sampled.row.demonstrations_M3)),
        ("candidates", "", lambda sampled: len(sampled.row.candidate_lengths_N)),
    ),
    "demonstrations": (
        ("tokens that the teacher reads", "tokens", _tokens),
        ("scored tokens of a row", "tokens", _scored),
    ),
    "preference_pairs": (
        ("tokens of the prompt", "tokens", lambda sampled: len(sampled.row.prompt_ids_T)),
        ("tokens of chosen", "tokens", lambda sampled: len(sampled.row.chosen_ids_C)),
        ("tokens of rejected", "tokens", lambda sampled: len(sampled.row.rejected_ids_R)),
    ),
    "responses": (
        ("tokens of a response", "tokens", lambda sampled: sampled.row.response_lengths_N),
        ("log-prob of a token", "nats", lambda sampled: sampled.row.logprobs_A),
    ),
    "teacher_logits": (
        ("entropy", "nats", lambda sampled: sampled.row.entropies_P),
        ("log-prob of the next token", "nats", lambda sampled: sampled.row.next_token_logprobs_P),
        ("kept mass", "", _kept_mass),
        ("kept entries", "", _num_kept),
    ),
    "span_masks": (("selected tokens of a row", "tokens", _scored),),
    "token_entropies": (("entropy", "nats", lambda sampled: sampled.row.token_entropies_P),),
    "advantages": (
        ("advantage of the token", "nats", lambda sampled: sampled.row.token_advantages_P),
        ("advantage of a kept entry", "nats", _kept_advantages),
        ("aligned less reference, a response", "nats", _log_ratios),
        ("kept entries", "", _num_kept),
    ),
    "subset_preferences": (
        ("log-prob of the answer", "nats", lambda sampled: sampled.row.answer_logprobs_N),
        ("rank of a subset", "", lambda sampled: sampled.row.ranks_N),
        ("best less worst subset", "nats", _lead),
    ),
    "candidate_scores": (
        ("log-prob of a candidate", "nats", lambda sampled: sampled.row.candidate_logprobs_N),
        ("rank of the right candidate", "", _gold_rank),
    ),
    "response_logprobs": (
        ("log-prob of a response", "nats", lambda sampled: sampled.row.response_logprobs_N),
        ("chosen less rejected", "nats", _margin),
    ),
    "response_token_logprobs": (
        ("log-prob of a token", "nats", lambda sampled: sampled.row.token_logprobs_A),
    ),
}
