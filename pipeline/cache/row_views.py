"""How a row of each table is shown to a person: ``VIEWS``, by the table's name."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from textwrap import shorten
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from pipeline.cache.pair_views import (
    Decode,
    advantages_table,
    pair_table,
    response_logprobs_table,
    response_token_logprobs_table,
    responses_table,
)
from schemas.distribution import unpack_threshold, unpack_threshold_tau, unpack_top_k
from schemas.errors import ConfigError
from schemas.scored_spans import SCORED, span_targets
from schemas.tables.candidate_scores import CandidateScores
from schemas.tables.conversations import Conversation
from schemas.tables.demonstrations import Demonstrated
from schemas.tables.documents import Document
from schemas.tables.episodes import Episode, split_candidates
from schemas.tables.prompted.advantages import AnyAdvantages
from schemas.tables.subset_preferences import SubsetPreferences, split_subsets
from schemas.tables.teacher_logits import RoundedLogits, TauLogits, ThresholdLogits, TopKLogits
from schemas.tables.token_entropies import TokenEntropies


@dataclass(frozen=True, slots=True)
class Look:
    """How a person asked to see rows: ids as text or not, and how much of each."""

    decode: Decode
    positions: int
    top: int


def view_of(table: str, row: Any, look: Look) -> Sequence[RenderableType]:
    """Return what to print of a row; a table without a view is shown column by column."""
    return VIEWS.get(table, _columns)(row, look)


def _columns(row: Any, look: Look) -> list[RenderableType]:
    view = RichTable("column", "value")
    for item in fields(row):
        view.add_row(item.name, Text(shorten(repr(getattr(row, item.name)), 200)))
    return [view]


def _text(row: Document, look: Look) -> list[RenderableType]:
    return [Text(f"{len(row.input_ids_T)} tokens: {look.decode(row.input_ids_T)!r}")]


def _advantages(row: AnyAdvantages, look: Look) -> list[RenderableType]:
    whole, view = advantages_table(row, positions=look.positions, top=look.top, decode=look.decode)
    return [Text(whole), view]


def _episode_table(row: Episode, decode: Decode) -> RichTable:
    """One line a part, as it was tokenised; the answer's candidates last."""
    kind = f"{row.kind}, draw {row.draw} of query {row.query_id}"
    view = RichTable("part", "tokens", "input", "answer", title=Text(f"{row.task} ({kind})"))
    spans = [*row.demonstrations_M3.tolist()]
    spans.append([row.query_start, row.answer_start, len(row.input_ids_T)])
    names = [*(f"demonstration {m}" for m in range(len(spans) - 1)), "query"]
    for name, (start, answer, end) in zip(names, spans, strict=True):
        texts = [repr(decode(row.input_ids_T[a:b])) for a, b in ((start, answer), (answer, end))]
        view.add_row(name, f"{start}..{end}", Text(texts[0]), Text(texts[1]))
    candidates = split_candidates(row.candidate_ids_C, row.candidate_lengths_N)
    for number, candidate in enumerate(candidates):
        mark = " (right)" if number == row.gold else ""
        text = Text(repr(decode(candidate)))
        view.add_row(f"candidate {number}{mark}", str(len(candidate)), "", text)
    return view


def _demonstrated(row: Demonstrated, look: Look) -> list[RenderableType]:
    """One line a part: what teacher and distiller read, then the query; candidates last."""
    seen = {
        "teacher": row.num_teacher_demonstrations,
        "distiller": row.num_distiller_demonstrations,
    }
    kind = f"{row.kind}, draw {row.draw} of query {row.query_id}" if row.task else "a document"
    read = ", ".join(f"the {who} reads {count}" for who, count in seen.items())
    title = f"{row.task} ({kind}): of {row.num_demonstrations} demonstrations {read}".strip()
    view = RichTable("part", "tokens", "read by", "text", title=Text(title))
    longer = max(row.input_ids_T[: row.query_start], row.distiller_ids_L, key=len)
    ends = [0, *row.demonstration_ends_M.tolist()]
    for m, (start, end) in enumerate(pairwise(ends)):
        readers = ", ".join(who for who, count in seen.items() if m < count)
        text = Text(repr(look.decode(longer[start:end])))
        view.add_row(f"demonstration {m}", f"{start}..{end}", readers, text)
    marks = [row.query_start, row.answer_start, len(row.input_ids_T)]
    for name, (start, end) in zip(("query", "answer"), pairwise(marks), strict=True):
        if start < end:
            text = Text(repr(look.decode(row.input_ids_T[start:end])))
            view.add_row(name, f"{start}..{end}", "teacher, reader", text)
    candidates = split_candidates(row.candidate_ids_C, row.candidate_lengths_N)
    for number, candidate in enumerate(candidates):
        mark = " (right)" if number == row.gold else ""
        text = Text(repr(look.decode(candidate)))
        view.add_row(f"candidate {number}{mark}", str(len(candidate)), "", text)
    return [view]


def _conversation(row: Conversation, look: Look) -> list[RenderableType]:
    """One line a part, by turns text that is read and text that is scored."""
    spans = np.asarray(row.scored_S2).reshape(-1, 2).tolist()
    title = f"{row.num_tokens} tokens, {row.num_positions} of them scored in {len(spans)} spans"
    if not spans:
        title = f"{row.num_tokens} tokens, a prompt: none is scored"
    if row.source_id:
        title += f"; answers {row.source_id}"
    if row.is_cut:
        title += "; its end was cut"
    view = RichTable("part", "tokens", "text", title=Text(title))
    marks = [0, *(mark for span in spans for mark in span), row.num_tokens]
    for number, (start, end) in enumerate(pairwise(marks)):
        if start < end:
            name = f"scored {number // 2}" if number % 2 else "read"
            text = Text(repr(look.decode(row.input_ids_T[start:end])))
            view.add_row(name, f"{start}..{end}", text, style="bold" if number % 2 else None)
    return [view]


def _subsets_table(row: SubsetPreferences) -> RichTable:
    view = RichTable("rank", "log Q (nats)", "demonstrations kept")
    subsets = split_subsets(row.subset_demonstrations_S, row.subset_sizes_N)
    scored = zip(row.ranks_N.tolist(), row.answer_logprobs_N.tolist(), subsets, strict=True)
    for rank, logprob, subset in sorted(scored, key=lambda entry: (entry[0], -entry[1])):
        view.add_row(str(rank), f"{logprob:.3f}", ", ".join(map(str, subset)) or "none")
    return view


def _candidates_table(row: CandidateScores) -> RichTable:
    view = RichTable("candidate", "tokens", "log p (nats)", "a token")
    scores = zip(row.candidate_logprobs_N.tolist(), row.candidate_num_tokens_N, strict=True)
    for number, (logprob, length) in enumerate(scores):
        view.add_row(str(number), str(length), f"{logprob:.3f}", f"{logprob / length:.3f}")
    return view


def scored_tokens(row: Any, signal: Any, look: Look) -> RichTable:
    """Return the teacher's view of the tokens that ``signal`` is about, with their text.

    Raises ConfigError for a row without token ids of its own, or with others than the signal's.
    """
    ids_T = getattr(row, "input_ids_T", None)
    if ids_T is None:
        raise ConfigError(
            f"sample {row.sample_id} has no input_ids_T, expected a row of documents, "
            f"conversations, episodes or demonstrations: leave --signals out"
        )
    whole = np.array([[signal.first_target, len(ids_T)]])
    targets_P = span_targets(getattr(row, SCORED, whole))
    if len(targets_P) != signal.num_positions or targets_P[0] != signal.first_target:
        raise ConfigError(
            f"sample {row.sample_id} has {len(targets_P)} scored tokens from {targets_P[0]}, its "
            f"signal {signal.num_positions} from {signal.first_target}: run `teachercache verify`"
        )
    names = [f"{t} {look.decode([ids_T[t]])!r}" for t in targets_P.tolist()]
    return _positions_table(signal, look, names)


def _positions_table(row: Any, look: Look, names: Sequence[str] = ()) -> RichTable:
    kept_as = "probability"
    if isinstance(row, ThresholdLogits | TauLogits):  # of its tail a sample, of equal weights
        kept_as = "weight: a probability, or a share of the sampled tail's"
    view = RichTable("predicts", "entropy", "log p(next)", f"the teacher's tokens ({kept_as})")
    entries = _entries(row)
    for j in range(min(look.positions, row.num_positions)):
        kept = sorted(entries[j], key=lambda entry: -entry[1])[: look.top]
        words = "  ".join(f"{look.decode([token])!r} {weight:.3f}" for token, weight in kept)
        view.add_row(
            Text(f"token {names[j] if names else row.first_target + j}"),
            _known(row.entropies_P[j]),
            _known(row.next_token_logprobs_P[j]),
            Text(words or "hidden state only (exact encoding)"),
        )
    return view


def _teacher_logits(row: Any, look: Look) -> list[RenderableType]:
    view = _positions_table(row, look)
    if not isinstance(row, RoundedLogits):
        return [view]
    cost = f"states in steps of {row.hidden_step:.4g}: {row.rounding_kl:.2g} nats of KL"
    return [Text(f"{cost} from the teacher unrounded"), view]


def _token_entropies(row: TokenEntropies, look: Look) -> list[RenderableType]:
    """The first positions in order, each with its place among all of the row."""
    entropies_P = np.asarray(row.token_entropies_P, np.float64)
    places_P = np.argsort(np.argsort(-entropies_P, kind="stable"), kind="stable")
    view = RichTable("position", "entropy (nats)", "place")
    for j in range(min(look.positions, row.num_positions)):
        view.add_row(str(j), f"{entropies_P[j]:.3f}", str(places_P[j] + 1))
    return [Text(f"{row.num_positions} positions, mean {entropies_P.mean():.3f} nats"), view]


def _known(value: Any) -> str:
    """Return a number of nats, or that nobody knows it."""
    return "unknown" if np.isnan(value) else f"{float(value):.2f}"


def _entries(row: Any) -> list[list[tuple[int, float]]]:
    """Return (token id, weight) pairs for each position; none for the exact encoding."""
    if isinstance(row, ThresholdLogits):
        weights_PK = unpack_threshold(row.token_ids_PK, row.num_head_P, row.head_codes_E)
    elif isinstance(row, TauLogits):
        counts_P = row.num_head_P.astype(int) + row.num_tail_P
        found = zip(counts_P.tolist(), *unpack_threshold_tau(asdict(row)), strict=True)
        return [list(zip(i.tolist(), w.tolist(), strict=True))[:count] for count, i, w in found]
    elif isinstance(row, TopKLogits):
        weights_PK = unpack_top_k(row.logprobs_PK, row.rest_logprobs_P)[0]
    else:
        return [[] for _ in range(row.num_positions)]
    ids_PK = np.asarray(row.token_ids_PK).tolist()
    return [list(zip(i, w, strict=True)) for i, w in zip(ids_PK, weights_PK.tolist(), strict=True)]


VIEWS: dict[str, Callable[[Any, Look], Sequence[RenderableType]]] = {
    "documents": _text,
    "conversations": _conversation,
    "episodes": lambda row, look: [_episode_table(row, look.decode)],
    "demonstrations": _demonstrated,
    "subset_preferences": lambda row, look: [_subsets_table(row)],
    "candidate_scores": lambda row, look: [_candidates_table(row)],
    "preference_pairs": lambda row, look: [pair_table(row, look.decode)],
    "responses": lambda row, look: [responses_table(row, look.decode)],
    "response_logprobs": lambda row, look: [response_logprobs_table(row)],
    "response_token_logprobs": lambda row, look: [response_token_logprobs_table(row)],
    "advantages": _advantages,
    "teacher_logits": _teacher_logits,
    "token_entropies": _token_entropies,
}
