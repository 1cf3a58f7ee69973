"""Samples as ranked lists: subsets of an episode's demonstrations, candidates, responses.

A sample is JSON for the page's script: its text in parts, and lines ``{rank, name, value, mark}``,
the best first.
"""

from typing import Any

import numpy as np

from pipeline.reports.page.sampled_rows import SampledRow
from pipeline.reports.page.token_view import ids_and_parts, rounded
from pipeline.reports.page.words import Words
from schemas.tables.episodes import split_candidates
from schemas.tables.subset_preferences import split_subsets

CHARACTERS_SHOWN = 600  # of a part

Json = dict[str, Any]


def subsets_sample(sampled: SampledRow, words: Words) -> Json:
    """Return an episode's subsets by rank, each with the demonstrations that it keeps."""
    row = sampled.row
    subsets = split_subsets(row.subset_demonstrations_S, row.subset_sizes_N)
    found = zip(row.ranks_N.tolist(), row.answer_logprobs_N.tolist(), subsets, strict=True)
    lines = [
        _line(rank, ", ".join(map(str, kept)) or "none", logprob)
        for rank, logprob, kept in sorted(found, key=lambda entry: (entry[0], -entry[1]))
    ]
    return _sample(sampled, words, lines, "demonstrations kept", "log Q of the answer, nats")


def candidates_sample(sampled: SampledRow, words: Words) -> Json:
    """Return an episode's candidates by log-prob a token, the right one marked."""
    row, source = sampled.row, sampled.source
    texts = [f"candidate {n}" for n in range(len(row.candidate_logprobs_N))]
    if source is not None and hasattr(source, "candidate_ids_C"):
        parts = split_candidates(source.candidate_ids_C, source.candidate_lengths_N)
        texts = [words.text([int(token) for token in ids]) for ids in parts]
    gold = int(getattr(source, "gold", -1))
    scores = row.candidate_logprobs_N / row.candidate_num_tokens_N
    lines = _ranked(scores, texts, {gold: "right"})
    return _sample(sampled, words, lines, "candidate", "log p a token, nats")


def logprobs_sample(sampled: SampledRow, words: Words) -> Json:
    """Return responses by their log-prob."""
    scores = sampled.row.response_logprobs_N
    names = [f"response {n}" for n in range(len(scores))]
    if hasattr(sampled.source, "chosen_ids_C"):
        names = ["chosen", "rejected"]
    lines = _ranked(scores, names, {})
    return _sample(sampled, words, lines, "response", "log p, nats")


def _ranked(scores_N: Any, names: list[str], marks: dict[int, str]) -> list[Json]:
    """Return lines by falling score; ties share the smallest of their ranks."""
    order = np.argsort(-np.asarray(scores_N, np.float64), kind="stable").tolist()
    ranks = [1 + int((scores_N > scores_N[n]).sum()) for n in order]
    return [
        _line(rank, names[n], float(scores_N[n]), marks.get(n, ""))
        for rank, n in zip(ranks, order, strict=True)
    ]


def _line(rank: int, name: str, value: float, mark: str = "") -> Json:
    return {"rank": rank, "name": name, "value": rounded(value), "mark": mark}


def _sample(
    sampled: SampledRow, words: Words, lines: list[Json], names_are: str, values_are: str
) -> Json:
    found = None if sampled.source is None else ids_and_parts(sampled.source)
    parts = []
    if found is not None:
        ids, spans = found
        for name, start, end in spans:
            text = words.text([int(token) for token in ids[start:end]])
            cut = text[:CHARACTERS_SHOWN] + ("…" if len(text) > CHARACTERS_SHOWN else "")
            parts.append({"name": name, "text": cut})
    values = [line["value"] for line in lines if line["value"] is not None]
    task = getattr(sampled.source, "task", "")
    return {
        "kind": "ranked",
        "id": sampled.row.sample_id,
        "row": sampled.index,
        "split": sampled.split,
        "task": task,
        "parts": parts,
        "lines": lines,
        "names_are": names_are,
        "values_are": values_are,
        "mean": rounded(max(values) - min(values)) if values else None,
    }
