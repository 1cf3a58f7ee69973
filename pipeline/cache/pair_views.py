"""Rows of preference alignment as a person reads them: pairs, responses, scores, advantages."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table as RichTable
from rich.text import Text

from schemas.advantage_values import advantage_values
from schemas.tables.advantages import (
    AnyAdvantages,
    ExactAdvantages,
    TauAdvantages,
    ThresholdAdvantages,
    UnionAdvantages,
)
from schemas.tables.episodes import split_candidates
from schemas.tables.preference_pairs import PreferencePair
from schemas.tables.response_logprobs import ResponseLogprobs
from schemas.tables.response_token_logprobs import ResponseTokenLogprobs
from schemas.tables.responses import FINISH_REASONS, Responses

Decode = Callable[[Any], str]


def pair_table(row: PreferencePair, decode: Decode) -> RichTable:
    """Show prompt, chosen and rejected, and whether the responses were cut."""
    view = RichTable("part", "tokens", "ended", "text")
    parts: list[tuple[str, Any, str]] = [
        ("prompt", row.prompt_ids_T, ""),
        ("chosen", row.chosen_ids_C, _ended(row.chosen_finished)),
        ("rejected", row.rejected_ids_R, _ended(row.rejected_finished)),
    ]
    for name, ids, ended in parts:
        view.add_row(name, str(len(ids)), ended, Text(repr(decode(ids))))
    return view


def _ended(finished: bool) -> str:
    return "by itself" if finished else "cut"


def responses_table(row: Responses, decode: Decode) -> RichTable:
    """Show the prompt and each response, with the student's log-prob of it."""
    view = RichTable("part", "tokens", "finish reason", "log p (nats)", "text")
    view.add_row("prompt", str(len(row.prompt_ids_T)), "", "", Text(repr(decode(row.prompt_ids_T))))
    logprobs = split_candidates(row.logprobs_A, row.response_lengths_N)
    responses = split_candidates(row.response_ids_A, row.response_lengths_N)
    for n, (ids, values) in enumerate(zip(responses, logprobs, strict=True)):
        reason = FINISH_REASONS[int(row.finish_reasons_N[n])]
        total = f"{float(values.sum()):.3f}"
        view.add_row(f"response {n}", str(len(ids)), reason, total, Text(repr(decode(ids))))
    return view


def response_logprobs_table(row: ResponseLogprobs) -> RichTable:
    """Show each response's log-prob, in all and a token."""
    view = RichTable("response", "tokens", "log p (nats)", "a token")
    lengths = row.response_num_tokens_N.tolist()
    for n, (logprob, length) in enumerate(zip(row.response_logprobs_N, lengths, strict=True)):
        view.add_row(str(n), str(length), f"{logprob:.3f}", f"{logprob / length:.3f}")
    return view


def response_token_logprobs_table(row: ResponseTokenLogprobs) -> RichTable:
    """Show each response's log-prob, in all and a token, and its least likely token's."""
    view = RichTable("response", "tokens", "log p (nats)", "a token", "least")
    parts = split_candidates(row.token_logprobs_A, row.response_num_tokens_N)
    for n, values in enumerate(parts):
        numbers = float(values.sum()), float(values.mean()), float(values.min())
        view.add_row(str(n), str(len(values)), *(f"{number:.3f}" for number in numbers))
    return view


def advantages_table(
    row: AnyAdvantages, *, positions: int, top: int, decode: Decode
) -> tuple[str, RichTable]:
    """Return a line on whole responses, and the largest advantages of each position.

    Of ``threshold_tau`` the A of a token that was drawn is not known apart from its chance.
    """
    scores = zip(row.teacher_logprobs_N.tolist(), row.reference_logprobs_N.tolist(), strict=True)
    whole = "  ".join(
        f"response {n}: aligned {aligned:.3f}, reference {reference:.3f}"
        for n, (aligned, reference) in enumerate(scores)
    )
    size = "(A - rest) / chance" if isinstance(row, TauAdvantages) else "A"
    view = RichTable("position", "A of its token", f"kept tokens by size of {size}")
    entries = _entries(row)
    for j in range(min(positions, row.num_positions)):
        kept = sorted(entries[j], key=lambda entry: -abs(entry[1]))[:top]
        words = "  ".join(f"{decode([token])!r} {value:+.3f}{note}" for token, value, note in kept)
        if isinstance(row, TauAdvantages):
            words = f"rest {float(row.rest_advantages_P[j]):+.3f}  {words}"
        text = Text(words or "hidden states only (exact support)")
        view.add_row(str(j), f"{float(row.token_advantages_P[j]):+.3f}", text)
    return f"log p in nats: {whole}", view


def _entries(row: AnyAdvantages) -> list[list[tuple[int, float, str]]]:
    """Return (token id, A, how likely it was to be kept) for each position."""
    match row:
        case ExactAdvantages():
            return [[] for _ in range(row.num_positions)]
        case TauAdvantages():
            ids_PK, values_PK, _ = advantage_values(asdict(row))
            kept = zip(row.num_entries_P.tolist(), ids_PK.tolist(), values_PK.tolist(), strict=True)
            return [[(i, v, "") for i, v in zip(*each, strict=True)][:n] for n, *each in kept]
        case UnionAdvantages():
            ends = np.cumsum(np.asarray(row.num_entries_P, np.int64))[:-1]
            ids, values = (np.split(part, ends) for part in (row.token_ids_E, row.advantages_E))
            return [
                [(int(i), float(v), "") for i, v in zip(*part, strict=True)]
                for part in zip(ids, values, strict=True)
            ]
        case ThresholdAdvantages():
            chances_PK = np.exp(row.log_inclusions_PK.astype(np.float64))
        case _:
            chances_PK = np.ones(row.token_ids_PK.shape)
    return [
        [
            (int(i), float(v), "" if chance == 1 else f" ({chance:.2g})")
            for i, v, chance in zip(*part, strict=True)
        ]
        for part in zip(row.token_ids_PK, row.advantages_PK, chances_PK, strict=True)
    ]
