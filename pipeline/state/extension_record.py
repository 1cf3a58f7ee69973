"""What an extension that was begun copies, as its plan says in the step's folder."""

import json
from dataclasses import asdict, dataclass

from schemas.storage.files import Folder, read_if_there, write_text

EXTENSION, PLAN = ".extend", "plan.json"  # its folder in the step's, and the file


@dataclass(frozen=True, slots=True)
class Source:
    """A finished table, and how many of the step's rows are copied of it."""

    folder: str
    fingerprint: str
    dataset_id: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class ExtensionPlan:
    """What is to be copied and what is new; ``shards`` are those of the step it is about."""

    shards: tuple[int, ...]
    sources: tuple[Source, ...]
    num_rows: int
    num_new: int

    @property
    def num_copied(self) -> int:
        """Rows of the step that lie in a source."""
        return sum(source.num_rows for source in self.sources)


def read_plan(folder: Folder) -> ExtensionPlan | None:
    """Return the plan in an extension's folder, None where there is none that can be read."""
    text = read_if_there(folder / PLAN)
    try:
        body = json.loads(text or "")
        sources = tuple(Source(**source) for source in body["sources"])
        return ExtensionPlan(tuple(body["shards"]), sources, body["num_rows"], body["num_new"])
    except (ValueError, TypeError, KeyError):
        return None


def write_plan(folder: Folder, plan: ExtensionPlan) -> None:
    """Write it down, whole or not at all."""
    write_text(folder / PLAN, json.dumps(asdict(plan), sort_keys=True) + "\n")
