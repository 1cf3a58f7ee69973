"""The tau that ``mean_k`` came to, in ``calibration.json`` beside the shards: found once, kept.

Whoever opens the stage first finds it: a run, each of its workers, runs of other shards, a run that
goes on after a kill. All read it from the file, and of several that come first at once the first
to write has its tau taken by all, so that a table has one tau, whatever the machines.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from schemas.errors import StoreError
from schemas.storage.files import Folder, read_if_there, write_once
from schemas.storage.records import all_notes

CALIBRATION = "calibration.json"
_RECORDS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """``tau``, and the mean number of entries that it keeps of the positions it was found on."""

    tau: float
    mean_entries: float
    num_positions: int
    num_rows: int

    def __str__(self) -> str:
        """Say it in a few words."""
        return (
            f"tau {self.tau:g}, {self.mean_entries:.2f} entries a position over the first "
            f"{self.num_positions:,}"
        )


def read_calibration(folder: Folder) -> Calibration | None:
    """Return what was found, None where nothing was yet; raises StoreError for a damaged file."""
    body = read_if_there(folder / CALIBRATION)
    return None if body is None else _parsed(folder, body)


def keep_first(folder: Folder, found: Calibration) -> Calibration:
    """Write what was found unless another process has; return what is there."""
    body = json.dumps(asdict(found), indent=1, sort_keys=True) + "\n"
    return _parsed(folder, write_once(folder / CALIBRATION, body))


def _parsed(folder: Folder, body: bytes) -> Calibration:
    try:
        found = Calibration(**json.loads(body))
        if not 0.0 < found.tau <= 1.0:
            raise ValueError(f"tau is {found.tau}")
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{folder / CALIBRATION} is damaged ({error}): write it again as it was (the record of "
            f"each finished shard has its tau), or delete the folder and run again"
        ) from error
    return found


def other_taus(folder: Folder, names: Sequence[str]) -> Iterator[str]:
    """Yield a line for each shard whose record has another tau than the table.

    A shard without a record, as in a table that was fetched from the hub, says nothing.
    """
    calibration = read_calibration(folder)
    tau = None if calibration is None else calibration.tau
    for start in range(0, len(names), _RECORDS_AT_ONCE):
        block = names[start : start + _RECORDS_AT_ONCE]
        for name, record in zip(block, all_notes(folder, block), strict=True):
            if record is not None and (found := record.get("notes", {}).get("tau")) != tau:
                yield f"{folder / name}.arrow was made with tau {found}, {CALIBRATION} says {tau}"


def require_one_tau(folder: Folder, names: Sequence[str]) -> None:
    """Refuse shards that were made by several taus, or by another than lies beside them."""
    if read_calibration(folder) is None:
        raise StoreError(f"{folder / CALIBRATION} has gone while shards were made: run again")
    others = [*other_taus(folder, names)]
    if others:
        more = f", and {len(others) - 1:,} more" if len(others) > 1 else ""
        raise StoreError(
            f"{others[0]}{more}: a table has one tau; delete the .json records of those shards and "
            f"run again"
        )
