"""What became of every document: counts that survive an interruption with the work they count."""

from dataclasses import dataclass, field
from typing import Any

from stages.sources.reading.rejects import Rejects, UnusableRecord, beginning


@dataclass(slots=True)
class Tally:
    """Documents read and rejected, documents cut short, rows made."""

    truncated: int = 0
    rows_made: int = 0
    rejects: Rejects = field(default_factory=Rejects)

    @property
    def documents_read(self) -> int:
        """All documents of the source, and the rows that hold none."""
        return self.rejects.num_read

    def reject(self, reason: str, count: int = 1) -> None:
        """Count documents or rows that are left out; a count of zero leaves no entry."""
        if count:
            self.rejects.counts[reason] += count

    def reject_text(self, reason: str, text: str, detail: str) -> None:
        """Count and list a document that is no longer known by its place: by its beginning."""
        self.rejects.add(beginning(text), UnusableRecord(reason, detail))

    def as_json(self) -> dict[str, Any]:
        """Return the counts as JSON values; ``from_json`` reads them back."""
        return {
            "truncated": self.truncated,
            "rows_made": self.rows_made,
            "rejects": self.rejects.as_json(),
        }

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "Tally":
        """Return the counts that ``as_json`` wrote."""
        return cls(**(body | {"rejects": Rejects.from_json(body["rejects"])}))
