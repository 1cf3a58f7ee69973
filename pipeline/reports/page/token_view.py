"""Samples as text whose tokens carry numbers: entropy, log-prob, advantage, and what was kept.

A sample is JSON for the page's script. Its tokens are ``[text, numbers, entries]``, ``numbers`` one
for each of the view's measures (null: not known, or the token is only read), ``entries`` the kept
tokens as ``[text, number]``, the largest first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.reports.page.distributions import kept_weights
from pipeline.reports.page.sampled_rows import SampledRow
from pipeline.reports.page.words import Words
from schemas.advantage_values import advantage_values
from schemas.scored_spans import SCORED, span_targets
from schemas.tables.prompted.advantages import ExactAdvantages, TauAdvantages, UnionAdvantages
from schemas.tables.teacher_logits import ExactLogits, RoundedLogits, TauLogits, ThresholdLogits

TOKENS_SHOWN = 384  # of a sample
ENTRIES_SHOWN = 8  # of a token

Part = tuple[str, int, int]  # what it is, and the half-open span of its tokens
Json = dict[str, Any]

ENTROPY = {"name": "entropy", "unit": "nats", "scale": "rising"}
SURPRISE = {"name": "surprise", "unit": "nats", "scale": "rising"}
ADVANTAGE = {"name": "advantage", "unit": "nats", "scale": "signed"}


def ids_and_parts(row: Any) -> tuple[Any, list[Part]] | None:
    """Return the token ids of an input's row and what each span of them is; None without ids."""
    if hasattr(row, "chosen_ids_C"):
        named = {
            "prompt": row.prompt_ids_T,
            "chosen": row.chosen_ids_C,
            "rejected": row.rejected_ids_R,
        }
        return _end_to_end(named)
    if hasattr(row, "response_ids_A"):
        ends = np.cumsum(np.asarray(row.response_lengths_N, np.int64))[:-1]
        responses = np.split(row.response_ids_A, ends)
        named = {f"response {n}": ids for n, ids in enumerate(responses)}
        return _end_to_end({"prompt": row.prompt_ids_T, **named})
    if not hasattr(row, "input_ids_T"):
        return None
    num_tokens = len(row.input_ids_T)
    if hasattr(row, "demonstrations_M3"):
        starts = [int(span[0]) for span in row.demonstrations_M3]
        names = [f"demonstration {m}" for m in range(len(starts))]
        marks = [*starts, row.query_start, row.answer_start, num_tokens]
        names += ["query", "answer"]
    elif hasattr(row, "query_start"):
        marks = [0, row.query_start, row.answer_start, num_tokens]
        names = ["demonstrations", "query", "answer"]
    elif hasattr(row, SCORED):
        spans = np.asarray(row.scored_S2, np.int64).reshape(-1).tolist()
        marks = [0, *spans, num_tokens]
        names = ["scored" if i % 2 else "read" for i in range(len(marks) - 1)]
    else:
        marks, names = [0, num_tokens], [""]
    if marks[0]:
        marks, names = [0, *marks], ["beginning", *names]
    named_spans = zip(names, pairwise(map(int, marks)), strict=True)
    parts = [(name, start, end) for name, (start, end) in named_spans if start < end]
    return row.input_ids_T, parts


def _end_to_end(named: Mapping[str, Any]) -> tuple[Any, list[Part]]:
    ends = np.cumsum([0, *map(len, named.values())]).tolist()
    parts = [(name, a, b) for name, (a, b) in zip(named, pairwise(ends), strict=True)]
    return np.concatenate([*named.values()]), parts


def plain_sample(sampled: SampledRow, words: Words) -> Json | None:
    """Return an input's row as text alone."""
    found = ids_and_parts(sampled.row)
    return None if found is None else _sample(sampled, *found, words, [], {}, {})


def logits_sample(sampled: SampledRow, words: Words) -> Json:
    """Return a row of ``teacher_logits`` on its text; raises ValueError where they do not meet."""
    row, found = sampled.row, ids_and_parts(sampled.source)
    if found is None:
        raise ValueError(f"sample {row.sample_id} has no input with token ids")
    ids, parts = found
    targets = _targets(row, sampled.source, len(ids))
    surprise_P = -np.asarray(row.next_token_logprobs_P, np.float64)
    numbers = {int(t): (e, s) for t, e, s in zip(targets, row.entropies_P, surprise_P, strict=True)}
    entries: dict[int, list[list[Any]]] = {}
    if (kept := kept_weights(row)) is not None:
        entries = {int(t): _largest(kept[0][j], kept[1][j], words) for j, t in enumerate(targets)}
    sample = _sample(sampled, ids, parts, words, [ENTROPY, SURPRISE], numbers, entries)
    if isinstance(row, ThresholdLogits | TauLogits):
        sample["entries_are"] = "weight: a probability, or an equal share of the sampled tail"
    elif isinstance(row, ExactLogits | RoundedLogits):
        sample["entries_are"] = "none: hidden states are kept, not tokens"
    else:
        sample["entries_are"] = "probability"
    return sample


def _targets(row: Any, source: Any, num_tokens: int) -> Any:
    """Return which tokens [P] the entries are about; see ``schemas.tables.teacher_logits``."""
    if hasattr(source, SCORED):
        targets = span_targets(source.scored_S2)
        targets = targets[max(len(targets) - row.num_positions, 0) :]  # of a T5 the answer's alone
    else:
        targets = np.arange(row.first_target, num_tokens)
    if len(targets) != row.num_positions or targets[0] != row.first_target:
        raise ValueError(
            f"sample {row.sample_id}: {row.num_positions} entries from token {row.first_target} on "
            f"are not about its input's {len(targets)} tokens"
        )
    return targets


def entropies_sample(sampled: SampledRow, words: Words) -> Json:
    """Return a row of ``token_entropies`` on its text; raises ValueError where they do not meet."""
    row, source, found = sampled.row, sampled.source, ids_and_parts(sampled.source)
    if source is None or found is None:
        raise ValueError(f"sample {row.sample_id} has no input with token ids")
    targets = np.arange(1, len(found[0]))
    if hasattr(source, SCORED):
        targets = span_targets(source.scored_S2)
    if len(targets) != row.num_positions:
        raise ValueError(
            f"sample {row.sample_id}: {row.num_positions} entropies are not about its input's "
            f"{len(targets)} tokens"
        )
    entropies = row.token_entropies_P.tolist()
    numbers = {int(t): (entropy,) for t, entropy in zip(targets, entropies, strict=True)}
    return _sample(sampled, *found, words, [ENTROPY], numbers, {})


def mask_sample(sampled: SampledRow, words: Words) -> Json:
    """Return the text that a row of ``span_masks`` is about, cut at its spans."""
    row, found = sampled.row, ids_and_parts(sampled.source)
    if found is None:
        raise ValueError(f"sample {row.sample_id} has no input with token ids")
    ids, _ = found
    marks = [0, *row.selected_S2.reshape(-1).tolist(), len(ids)]
    names = ["selected" if n % 2 else "read" for n in range(len(marks) - 1)]
    parts = [(name, a, b) for name, (a, b) in zip(names, pairwise(marks), strict=True) if a < b]
    return _sample(sampled, ids, parts, words, [], {}, {})


def advantages_sample(sampled: SampledRow, words: Words) -> Json:
    """Return a row of ``advantages`` on prompt and responses; raises ValueError without them."""
    row, source = sampled.row, sampled.source
    found = ids_and_parts(source)
    if source is None or found is None:
        raise ValueError(f"sample {row.sample_id} has no input with token ids")
    ids, parts = found
    first = len(ids) - row.num_positions  # responses stand last, end to end
    if first != len(source.prompt_ids_T):
        raise ValueError(f"sample {row.sample_id}: {row.num_positions} entries miss its responses")
    numbers = {first + j: (a,) for j, a in enumerate(row.token_advantages_P.tolist())}
    entries: dict[int, list[list[Any]]] = {}
    if not isinstance(row, ExactAdvantages):
        ids_PK, values_PK, rest_P = advantage_values(asdict(row))
        if hasattr(row, "advantages_PK"):
            values_PK = row.advantages_PK
        elif isinstance(row, UnionAdvantages):
            values_PK = np.where(values_PK != 0, values_PK + rest_P[:, None], 0)
        entries = {
            first + j: _largest(ids_PK[j], values_PK[j], words) for j in range(row.num_positions)
        }
    sample = _sample(sampled, ids, parts, words, [ADVANTAGE], numbers, entries)
    sample["entries_are"] = "advantage, nats"
    if isinstance(row, TauAdvantages):
        sample["entries_are"] = "(advantage less the position's rest) / chance of being drawn, nats"
    scores = zip(row.teacher_logprobs_N.tolist(), row.reference_logprobs_N.tolist(), strict=True)
    sample["notes"] = [
        f"{part[0]}: log p aligned {aligned:.2f}, reference {reference:.2f} nats"
        for part, (aligned, reference) in zip(parts[1:], scores, strict=False)
    ]
    return sample


def responses_sample(sampled: SampledRow, words: Words) -> Json:
    """Return a row of ``responses``, each token with how unlikely its writer found it."""
    row = sampled.row
    found = ids_and_parts(row)
    assert found is not None
    first = len(row.prompt_ids_T)
    numbers = {first + j: (-p,) for j, p in enumerate(row.logprobs_A.tolist())}
    probs_AK = np.exp(np.asarray(row.top_logprobs_AK, np.float64))
    entries = {
        first + j: _largest(row.top_ids_AK[j], probs_AK[j], words) for j in range(len(probs_AK))
    }
    sample = _sample(sampled, *found, words, [SURPRISE], numbers, entries)
    sample["entries_are"] = "probability, the writer's"
    return sample


def _largest(ids_K: Any, values_K: Any, words: Words) -> list[list[Any]]:
    """Return the text and number of a position's largest entries; those of 0 are fillers."""
    values = np.asarray(values_K, np.float64)
    order = np.argsort(-np.abs(values), kind="stable")[:ENTRIES_SHOWN]
    return [[words.alone(int(ids_K[k])), rounded(values[k])] for k in order if values[k] != 0]


def _sample(
    sampled: SampledRow,
    ids: Any,
    parts: Sequence[Part],
    words: Words,
    measures: Sequence[Mapping[str, str]],
    numbers: Mapping[int, Sequence[float]],
    entries: Mapping[int, list[list[Any]]],
) -> Json:
    pieces = words.pieces([int(token) for token in ids[:TOKENS_SHOWN]])
    unknown = [None] * len(measures)
    shown = []
    for name, start, end in parts:
        tokens = [
            [
                pieces[t],
                [rounded(n) for n in numbers[t]] if t in numbers else unknown,
                entries.get(t, []),
            ]
            for t in range(start, min(end, len(pieces)))
        ]
        if tokens:
            shown.append({"name": name, "tokens": tokens})
    told = [values[0] for values in numbers.values() if np.isfinite(values[0])]
    return {
        "kind": "tokens",
        "id": sampled.row.sample_id,
        "row": sampled.index,
        "split": sampled.split,
        "measures": list(measures),
        "mean": rounded(float(np.mean(told))) if told else None,
        "parts": shown,
        "left_out": max(len(ids) - TOKENS_SHOWN, 0),
        "notes": [],
    }


def rounded(value: float) -> float | None:
    """Return a number as the page's JSON holds it; None for one that is not known."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
