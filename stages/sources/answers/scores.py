"""Scores that a user gave to responses, by the response they are of."""

import math
from typing import Any

from stages.sources.answers.stage import ScoreFiles
from stages.sources.reading.lines import field_of, shown, text_of
from stages.sources.reading.records import read_records
from stages.sources.reading.rejects import MalformedRecord, Rejects

Scores = dict[tuple[str, int], float | str]  # or, in words, why there is none to go by


def read_scores(files: ScoreFiles) -> Scores:
    """Return the score of each response, by ``sample_id`` and its number in that row.

    A record without those two is passed over; raises ConfigError where all are malformed.
    """
    scores: Scores = {}
    with Rejects().of_source() as rejects:
        for place, record in read_records(files, rejects):
            try:
                key = (text_of(record, "sample_id"), _number_of(record))
                score = _score_of(record, files.column)
            except MalformedRecord as error:
                rejects.add(place, error)
                continue
            if key in scores and scores[key] != score:
                score = "more than one score"
            scores[key] = score
    return scores


def _number_of(record: dict[str, Any]) -> int:
    value = field_of(record, "response", "a response's number from 0")
    if isinstance(value, bool) or not isinstance(value, int):
        raise MalformedRecord(
            "not_a_number", f"'response' is {shown(value)}, expected a response's number from 0"
        )
    return value


def _score_of(record: dict[str, Any], column: str) -> float | str:
    if column not in record:
        field_of(record, column, "a number")  # raises: the column has another name
    value = record[column]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "score is no finite number"
    return float(value)
