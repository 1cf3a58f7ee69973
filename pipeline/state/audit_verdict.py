"""The verdict of an audit, kept beside the table that it is about: is the cache its teacher's?

It is a file of its own, ``audit.json``, which no manifest names: an audit comes after a table is
finished, says nothing that a trainer reads, and may be done again. It holds the id of the data set
that it judged, so that the verdict on other bytes in the same folder counts as none.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from schemas.errors import StoreError
from schemas.storage.files import Folder, read_if_there, write_text

AUDIT = "audit.json"

Outcome = Literal["faithful", "unfaithful"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditVerdict:
    """What an audit found: of which data set, on how many rows, against which live teacher.

    ``audited_at`` is a time in UTC, ISO 8601. ``measures`` has, by name, what was compared, each
    with what was found and what was allowed; ``failures`` one line for each row that differs by
    more, the first of them. ``settings`` say how the audit was made, so that it can be repeated.
    """

    outcome: Outcome
    dataset_id: str
    audited_at: str
    num_rows: int
    num_positions: int
    engine: str
    settings: dict[str, Any]
    measures: dict[str, Any]
    truncation: dict[str, float]
    failures: list[str]


_FIELDS = [item.name for item in fields(AuditVerdict)]


def write_verdict(folder: Folder, verdict: AuditVerdict) -> None:
    """Write ``audit.json`` in the folder of the table, over that of an earlier audit."""
    write_text(folder / AUDIT, json.dumps(asdict(verdict), indent=1, sort_keys=True) + "\n")


def verdict_of(folder: Folder, dataset_id: str) -> AuditVerdict | None:
    """Return the verdict on a data set, None where its table was not audited since it was made.

    Raises StoreError for a file that is damaged.
    """
    text = read_if_there(folder / AUDIT)
    if text is None:
        return None
    try:
        body = json.loads(text)
        verdict = AuditVerdict(**{name: body[name] for name in _FIELDS})
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{folder / AUDIT} is damaged ({error}): delete it and audit the table again"
        ) from error
    return verdict if verdict.dataset_id == dataset_id else None
