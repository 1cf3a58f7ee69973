"""What an export wrote, and what it left behind: what a person is told of it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Written:
    """Rows of each split, and in one line what the format could not hold, "" if nothing."""

    rows: Mapping[str, int]
    lost: str
