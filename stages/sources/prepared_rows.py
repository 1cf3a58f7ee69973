"""Finished rows of a table that is small enough to be made in memory, one file a shard.

The file that lists the shards is written last and names what they were made of: where it speaks of
the same configuration, files and tokenizer, there is nothing to do.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError, StoreError
from schemas.storage.files import write_text
from schemas.storage.shards import read_shard, write_shard
from schemas.table import Table
from schemas.tables.documents import SPLITS
from stages.models.checkpoints.tokenizer_identity import tokenizer_fingerprint
from stages.sources.prepared import PreparedShards, SourceShard, cut_shards, within
from stages.sources.reading.rejects import Rejects
from stages.sources.reading.tokens import TextTokenizer, model_limits
from stages.stage import SourceStage


def identity_of(stage: SourceStage) -> dict[str, Any]:
    """Return all that decides a stage's rows: configuration, files, tokenizer, model limits."""
    folder = Path(stage.tokenizer).expanduser()
    return {
        "version": stage.VERSION,
        "stage": stage.model_dump(mode="json", exclude=set(stage.NOT_HASHED)),
        "tokenizer": tokenizer_fingerprint(folder),
        "limits": list(model_limits(folder, 0)),
    } | stage.source_identity()


def prepare_rows(
    table: Table[Any],
    stage: SourceStage,
    work_dir: Path,
    make: Callable[[TextTokenizer], tuple[Sequence[Any], PreparedShards]],
) -> PreparedShards:
    """Return the shards of ``stage`` in ``work_dir``; ``make`` makes them where they are not."""
    made = PreparedRows(table, work_dir)
    identity = identity_of(stage)
    prepared = made.finished(identity)
    if prepared is None:
        made.clear()
        tokenizer = TextTokenizer(Path(stage.tokenizer).expanduser())
        rows, prepared = make(tokenizer)
        made.write(rows, prepared, identity=identity, vocab_size=tokenizer.vocab_size)
    return prepared


def require_splits(
    found: Sequence[Any], read: Rejects, *, heldout: bool, what: str, advice: str
) -> None:
    """Raise ConfigError where train, or ``heldout`` if asked for, has no row, with the reasons."""
    there = {row.split for row in found}
    for split in SPLITS if heldout else SPLITS[:1]:
        if split not in there:
            counts = sorted((why, count) for why, count in read.counts.items() if count)
            reasons = ", ".join(f"{why} {count}" for why, count in counts)
            raise ConfigError(
                f"no {split} row is left of the {what} ({reasons or 'none was rejected'}); {advice}"
            )


def sampled(
    found: Sequence[Any], read: Rejects, *, rows_per_shard: int, max_rows: int | None
) -> tuple[list[Any], PreparedShards]:
    """Return the rows to keep, train first, by the order of their ``sample_id``, and their shards.

    What is beyond ``max_rows`` is counted among the rejects, in proportion to the splits.
    """
    by_split: dict[str, list[Any]] = {split: [] for split in SPLITS}
    for row in sorted(found, key=lambda row: row.sample_id):
        by_split[row.split].append(row)
    kept = within({split: len(rows) for split, rows in by_split.items()}, max_rows)
    read.counts["beyond_max_rows"] = len(found) - sum(kept.values())
    rows = [row for split in SPLITS for row in by_split[split][: kept[split]]]
    rejects = {why: count for why, count in sorted(read.counts.items()) if count}
    shards = cut_shards(kept, rows_per_shard)
    return rows, PreparedShards(shards=shards, rejects=rejects, rejected=tuple(read.listed))


class PreparedRows:
    """The rows of one table in one working folder, under the table's name."""

    def __init__(self, table: Table[Any], work_dir: Path) -> None:
        """Read nothing yet."""
        self.table = table
        self.work_dir = work_dir
        self._marker = work_dir / f"{table.name}.json"

    def finished(self, identity: dict[str, Any]) -> PreparedShards | None:
        """Return what was made of ``identity``; None where it is something else, or not whole."""
        body = self._body()
        if body is None or body["identity"] != identity:
            return None
        shards = tuple(SourceShard(**shard) for shard in body["shards"])
        rejected = tuple(body["rejected"])
        return PreparedShards(shards=shards, rejects=body["rejects"], rejected=rejected)

    def clear(self) -> None:
        """Remove whatever was made before."""
        self._marker.unlink(missing_ok=True)
        shutil.rmtree(self.work_dir / self.table.name, ignore_errors=True)

    def write(
        self,
        rows: Sequence[Any],
        prepared: PreparedShards,
        *,
        identity: dict[str, Any],
        vocab_size: int,
    ) -> None:
        """Write the rows of all shards, in order, and mark the folder as complete."""
        bound = self.table.bind(vocab_size=vocab_size)
        start = 0
        for index, shard in enumerate(prepared.shards):
            write_shard(self._shard_path(index), bound, rows[start : start + shard.rows])
            start += shard.rows
        body = {"identity": identity} | asdict(prepared)
        write_text(self._marker, json.dumps(body, indent=1) + "\n")

    def read(self, index: int) -> Iterator[Any]:
        """Yield the rows of one shard, in order; raises StoreError where nothing is prepared."""
        if not self._marker.is_file():
            raise StoreError(
                f"{self.work_dir} holds no complete {self.table.name}: run the recipe again"
            )
        for batch in read_shard(self._shard_path(index)).to_batches():
            yield from self.table.rows(batch)

    def _body(self) -> dict[str, Any] | None:
        if not self._marker.is_file():
            return None
        body: dict[str, Any] = json.loads(self._marker.read_text(encoding="utf-8"))
        return body

    def _shard_path(self, index: int) -> Path:
        return self.work_dir / self.table.name / f"shard-{index:06d}.arrow"
