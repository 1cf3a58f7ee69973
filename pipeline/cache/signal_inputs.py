"""The input that teacher logits were made of, beside them: whether they are of its tokens."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.planning.fingerprint import ADDRESS_DIGITS
from schemas.errors import TeacherCacheError
from schemas.open_table import known_table
from schemas.scored_spans import INPUT_COLUMNS, misplaced
from schemas.storage.files import Folder
from schemas.storage.manifest import MANIFEST, Manifest, read_manifest
from schemas.storage.records import ShardRecord, shard_index
from schemas.storage.shard_cache import local_file
from schemas.storage.shards import read_shard
from schemas.table import Table
from schemas.tables import teacher_logits
from schemas.tables.conversations import CONVERSATIONS
from schemas.tables.demonstrations import DEMONSTRATIONS
from schemas.tables.documents import DOCUMENTS
from schemas.tables.episodes import EPISODES
from schemas.tables.preference_pairs import PREFERENCE_PAIRS

_SCORED = (
    DOCUMENTS,
    EPISODES,
    CONVERSATIONS,
    DEMONSTRATIONS,
    PREFERENCE_PAIRS,
)  # what ``teacher_logits`` are made of


class Source(NamedTuple):
    """A finished table that signals were made of."""

    folder: Folder
    manifest: Manifest


def source_of(folder: Folder, manifest: Manifest) -> Source | None:
    """Return the table that the logits in ``folder`` were made of, None where it is not there.

    It lies where a recipe's root has it, by its table and fingerprint.
    """
    if manifest.table != teacher_logits.NAME:
        return None
    for fingerprint in manifest.identity.get("inputs", ()):
        for table in _SCORED:
            beside = folder.parent.parent / table.name / fingerprint[:ADDRESS_DIGITS]
            with suppress(TeacherCacheError):  # what is wrong there is said of that table
                if (beside / MANIFEST).is_file():
                    found = read_manifest(beside)
                    return Source(beside, found) if found.fingerprint == fingerprint else None
    return None


def misplaced_row(
    content: pa.Table, table: Table[Any], shard: ShardRecord, source: Source
) -> tuple[int, str, str] | None:
    """Return number, ``sample_id`` and fault of the first row that its input contradicts.

    A shard is made of the input's shard of the same index; where that cannot be read, the input's
    own check says why, and None is returned.
    """
    try:
        inputs = dict(_inputs(source, shard_index(shard.name)))
    except (TeacherCacheError, OSError, ValueError, IndexError):
        return None
    names = ("sample_id", "first_target", "next_token_logprobs_P")
    number = 0
    for batch in content.to_batches():
        columns = [table.column_values(batch, name) for name in names]
        for values in zip(*columns, strict=True):
            row = dict(zip(names, values, strict=True))
            if row["sample_id"] not in inputs:
                return number, row["sample_id"], f"{source.folder} has no such sample in its shard"
            if problem := misplaced(row | inputs[row["sample_id"]]):
                return number, row["sample_id"], problem
            number += 1
    return None


def _inputs(source: Source, index: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the columns of token ids of a shard's rows, by their keys."""
    shard = source.manifest.shards[index]
    table = known_table(source.manifest, source.folder)
    names = [name for name in INPUT_COLUMNS if name in table.columns]
    with local_file(source.folder / shard.file, shard.sha256) as file:
        content = read_shard(file)
    for batch in content.to_batches():
        columns = [table.column_values(batch, name) for name in names]
        for key, *values in zip(table.column_values(batch, "sample_id"), *columns, strict=True):
            yield key, dict(zip(names, values, strict=True))
