"""What the last audit of a table said, for listings: its verdict, or that it was on other bytes."""

from dataclasses import dataclass
from typing import Any

from pipeline.state.audit_verdict import AUDIT, verdict_of
from schemas.errors import StoreError
from schemas.storage.files import Folder

STALE, DAMAGED, NONE = "stale", "damaged", "-"


@dataclass(frozen=True, slots=True)
class AuditState:
    """``outcome`` is faithful, unfaithful, stale (of other bytes), damaged, or - for no audit."""

    outcome: str = NONE
    audited_at: str | None = None
    num_rows: int | None = None

    def __str__(self) -> str:
        """Say it in a table's cell: the verdict, its day and its rows."""
        if self.audited_at is None:
            return self.outcome
        return f"{self.outcome}, {self.audited_at[:10]}, {self.num_rows:,} rows"

    def as_dict(self) -> dict[str, Any] | None:
        """Return it for JSON, None where there was no audit."""
        if self.outcome == NONE:
            return None
        names = ("outcome", "audited_at", "num_rows")
        return {name: getattr(self, name) for name in names}


def audit_state(folder: Folder, dataset_id: str) -> AuditState:
    """Return what an audit said of the data set that lies in a folder; a small file is read."""
    try:
        verdict = verdict_of(folder, dataset_id)
    except StoreError:
        return AuditState(DAMAGED)
    if verdict is None:
        return AuditState(STALE if (folder / AUDIT).is_file() else NONE)
    return AuditState(verdict.outcome, verdict.audited_at, verdict.num_rows)
