"""What became of every document: counts that survive an interruption with the work they count."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Tally:
    """Documents read, documents cut short, rows made, and rejects by reason."""

    documents_read: int = 0
    truncated: int = 0
    rows_made: int = 0
    rejects: Counter[str] = field(default_factory=Counter)

    def reject(self, reason: str, count: int = 1) -> None:
        """Count rejects; a count of zero leaves no entry."""
        if count:
            self.rejects[reason] += count

    def as_json(self) -> dict[str, Any]:
        """Return the counts as JSON values; ``from_json`` reads them back."""
        return {
            "documents_read": self.documents_read,
            "truncated": self.truncated,
            "rows_made": self.rows_made,
            "rejects": dict(sorted(self.rejects.items())),
        }

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "Tally":
        """Return the counts that ``as_json`` wrote."""
        return cls(**(body | {"rejects": Counter(body["rejects"])}))
