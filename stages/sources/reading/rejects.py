"""Records that make no row: counted by reason, the first ones listed, and how many are too many.

A record is *malformed* where it is not what its format says (broken JSON, a missing column, null or
a number for a text); more of them than ``max_rejected_fraction`` of all records end the step. It is
*unusable* where it reads well and makes no row (an empty input, two best answers): counted alone.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from schemas.errors import ConfigError, RejectLimitError

LISTED = 100  # records of each reason that are listed with their places
_SHOWN = 80  # characters of a text that stands for a record
HOPELESS = 10_000  # malformed records, and no other, after which nobody reads on


class UnusableRecord(Exception):
    """A record that makes no row; ``reason`` is what it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        """Keep the reason; ``detail`` is what was got and what was expected, in one line."""
        super().__init__(detail)
        self.reason = reason


class MalformedRecord(UnusableRecord):
    """A record that is not what its format says."""


def beginning(text: str) -> str:
    """Return a text's first characters as they are shown for it."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


@dataclass(slots=True)
class Rejects:
    """What was read of a source and not kept, be it found while reading or later.

    ``counts`` is by reason, ``malformed`` the part of it that the limit is about. ``listed`` has
    ``place`` (``file:line``, or the beginning of the text where records are no longer known by
    their lines), ``reason`` and ``detail`` of the first records of each reason.
    """

    num_read: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    malformed: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, str]] = field(default_factory=list)

    def add(self, place: str, error: UnusableRecord) -> None:
        """Count a record; raises ConfigError where very many were read and all are malformed."""
        self.counts[error.reason] += 1
        if isinstance(error, MalformedRecord):
            self.malformed[error.reason] += 1
        if self.counts[error.reason] <= LISTED:
            self.listed.append({"place": place, "reason": error.reason, "detail": str(error)})
        if self.malformed.total() == HOPELESS:
            self.require_some()

    @contextmanager
    def passing(self, place: str) -> Iterator[None]:
        """Count the record at ``place`` where the block finds it unusable, and go on after it."""
        try:
            yield
        except UnusableRecord as error:
            self.add(place, error)

    @contextmanager
    def of_source(self) -> Iterator["Rejects"]:
        """Count one of several sources by itself; raises ConfigError where all is malformed."""
        own = Rejects()
        yield own
        own.require_some()
        self.num_read += own.num_read
        self.counts += own.counts
        self.malformed += own.malformed
        self.listed += own.listed

    def require_some(self) -> None:
        """Raise ConfigError where every record is malformed: the format itself is another one."""
        if self.num_read and self.malformed.total() >= self.num_read:
            alike = f" (so are all {self.num_read:,} records read)" if self.num_read > 1 else ""
            raise ConfigError(f"{self._commonest()}{alike}")

    def require_within(self, max_rejected_fraction: float) -> None:
        """Raise RejectLimitError where too many are malformed, ConfigError where all are."""
        self.require_some()
        found = self.malformed.total()
        if found > max_rejected_fraction * self.num_read:
            reason, count = self.malformed.most_common(1)[0]
            raise RejectLimitError(
                f"{found:,} of {self.num_read:,} records are malformed, more than "
                f"max_rejected_fraction {max_rejected_fraction}: {count:,} x '{reason}', first "
                f"{self._commonest()}; repair them, or raise max_rejected_fraction"
            )

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON values; ``from_json`` reads them back."""
        return {
            "num_read": self.num_read,
            "counts": dict(sorted(self.counts.items())),
            "malformed": dict(sorted(self.malformed.items())),
            "listed": self.listed,
        }

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "Rejects":
        """Return what ``as_json`` wrote."""
        counts = {name: Counter(body[name]) for name in ("counts", "malformed")}
        return cls(num_read=body["num_read"], listed=list(body["listed"]), **counts)

    def _commonest(self) -> str:
        """Return place and detail of the first record with the commonest fault."""
        reason = self.malformed.most_common(1)[0][0]
        alike = [row for row in self.listed if row["reason"] == reason]
        detail = Counter(row["detail"] for row in alike).most_common(1)[0][0]
        first = next(row for row in alike if row["detail"] == detail)
        return f"{first['place']}: {detail}"
