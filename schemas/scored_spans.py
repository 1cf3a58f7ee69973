"""Which tokens of a row are scored: half-open spans ``[start, end)`` of indices in its token ids.

An input table that has the column ``scored_S2`` has those tokens scored and no others (by an
encoder-decoder those of them that its decoder says); without it every token but the first is. Spans
are not empty, lie in order and do not overlap, and none begins at the first token, which has no
context. A signal's entries are those of all spans end to end.

Dimensions: S = spans, P = scored positions.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ConfigError, StoreError

SCORED: str = "scored_S2"


def span_targets(spans_S2: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the indices [P] of the scored tokens, in order."""
    spans = np.asarray(spans_S2, np.int64).reshape(-1, 2)
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(a, b) for a, b in spans)])


def span_problem(spans_S2: npt.NDArray[Any], num_tokens: int) -> str:
    """Return what is wrong with the spans of a row of ``num_tokens``, ``""`` if nothing is."""
    spans = np.asarray(spans_S2, np.int64).reshape(-1, 2)
    marks = spans.reshape(-1)
    in_order = bool((spans[:, 0] < spans[:, 1]).all() and (marks[1:] >= marks[:-1]).all())
    if len(spans) and in_order and marks[0] >= 1 and marks[-1] <= num_tokens:
        return ""
    return f"scored spans {spans.tolist()} do not lie in order within tokens 1 to {num_tokens - 1}"


def scored_targets(row: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """Return the indices [P] in ``input_ids_T`` of the tokens that are predicted and scored.

    Those of the row's spans, or else all from the first one that a signal is about. Raises
    StoreError where the row's signal is about others.
    """
    num_tokens = len(row["input_ids_T"])
    start = int(row.get("first_target", 1))
    scored = row.get("next_token_logprobs_P")
    if SCORED in row:
        targets_P = span_targets(row[SCORED])
        if not len(targets_P):
            raise ConfigError(
                f"sample {row['sample_id']} has no scored token, it is a prompt (turns: none): "
                f"train on conversations with answers"
            )
        if scored is not None and (len(scored), start) != (len(targets_P), int(targets_P[0])):
            raise StoreError(
                f"sample {row['sample_id']}: signals for {len(scored)} tokens from {start} on, the "
                f"row's spans have {len(targets_P)} from {int(targets_P[0])} on: run `teachercache "
                f"verify` on the data"
            )
        return targets_P
    return np.arange(start, num_tokens if scored is None else start + len(scored))


INPUT_COLUMNS = (
    *("input_ids_T", "prompt_ids_T", "chosen_ids_C", "rejected_ids_R"),
    *(SCORED, "answer_start"),
)


def misplaced(row: Mapping[str, Any]) -> str:
    """Return how the positions of a row, joined with its input, miss that input's tokens.

    Of a document or an episode every token but the first is scored, of a pair both responses, of a
    row that names spans their tokens (or those of the answer alone, by an encoder-decoder). ""
    where they meet, and where the input (of ``INPUT_COLUMNS``) is not among the columns.
    """
    first_target, num_found = row["first_target"], len(row["next_token_logprobs_P"])
    if SCORED in row:
        targets_P = span_targets(row[SCORED])
        answer_P = targets_P[targets_P >= row.get("answer_start", len(row["input_ids_T"]))]
        if (first_target, num_found) == (min(answer_P, default=0), len(answer_P)):
            return ""
        start, num_positions = int(min(targets_P, default=0)), len(targets_P)
    elif "chosen_ids_C" in row:
        start = len(row["prompt_ids_T"])
        num_positions = len(row["chosen_ids_C"]) + len(row["rejected_ids_R"])
    elif "input_ids_T" in row:
        start, num_positions = 1, len(row["input_ids_T"]) - 1
    else:
        return ""
    if (first_target, num_found) == (start, num_positions):
        return ""
    return (
        f"signals for {num_found} tokens from token {first_target} on, its input has "
        f"{num_positions} from token {start} on"
    )
