"""Which rows of a table are audited, and how much of each: seeded, and as little as is enough.

One row is drawn from each of n equal parts of the table. A fault in a share f of the rows is then
missed with at most ``(1 - f)^n``, wherever in the table it is: n = 459 finds one in 1 % of the rows
with 99 %. A causal model says of a row's beginning what it says of the whole, so most rows are read
as far as a few scored positions, and as many as the budget holds to their end.

The budget is a share of the capture, counted in tokens that the teacher reads.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.audit.audited import AuditedTable
from schemas.errors import StoreError
from schemas.open_table import OpenTable, open_table
from schemas.storage.files import sha256_of
from schemas.storage.object_path import ObjectPath
from schemas.storage.records import ShardRecord, shard_index
from schemas.storage.shards import read_verified, with_split
from stages.signals.scoring.agreement import Question

FOUND, OF_ROWS = 0.99, 0.01  # a fault in this share of rows is found with this probability
FEWEST = 3  # scored positions that are read of a row, of each response
BUDGET = 0.02  # of the capture's tokens, the control's among them
_SAMPLE = 0.6  # of the budget; the rest is for the control, each of whose rows is read twice
LEAST_CONTROL, MOST_CONTROL = 16, 64
LEAST_WHOLE = 2  # rows that are read to their end whatever it costs
I64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A stored row that is audited: where it is, what it holds, what is asked about it."""

    shard: ShardRecord
    row: int
    stored: Mapping[str, Any]
    question: Question
    is_whole: bool

    @property
    def place(self) -> str:
        """The row as a person finds it."""
        return f"{self.question.sample_id} ({self.shard.file} row {self.row})"


@dataclass(slots=True)
class Sample:
    """The rows of an audit in random order, and those of them that the control makes again."""

    rows: list[Sampled] = field(default_factory=list)
    num_control: int = 0
    problems: list[str] = field(default_factory=list)
    capture_tokens: float = 0.0

    @property
    def control(self) -> list[Sampled]:
        """Rows that two live passes are compared on."""
        return self.rows[: self.num_control]

    @property
    def num_whole(self) -> int:
        """Rows that are read to their end."""
        return sum(row.is_whole for row in self.rows)


def rows_needed(num_rows: int) -> int:
    """Return how many rows find a fault in 1 % of them with 99 %; all of a small table."""
    return min(num_rows, math.ceil(math.log(1.0 - FOUND) / math.log(1.0 - OF_ROWS)))


def finds(num_sampled: int, num_rows: int) -> float:
    """Return the smallest share of rows in which a fault is found with 99 %."""
    if num_sampled >= num_rows:
        return 1.0 / max(num_rows, 1)
    return 1.0 - math.exp(math.log(1.0 - FOUND) / num_sampled) if num_sampled else 1.0


def drawn_rows(num_rows: int, num_drawn: int, seed: int) -> I64Array:
    """Return one row of each of ``num_drawn`` equal parts of a table, in order."""
    edges = np.linspace(0, num_rows, num_drawn + 1)
    drawn = edges[:-1] + np.random.default_rng(seed).random(num_drawn) * np.diff(edges)
    # Parts of less than a row in common may both give it: the next one is free then.
    found = np.minimum(np.floor(drawn).astype(np.int64), num_rows - 1)
    for place in range(1, num_drawn):
        found[place] = max(found[place], found[place - 1] + 1)
    return np.asarray(np.minimum(found, num_rows - num_drawn + np.arange(num_drawn)))


def draw_sample(table: AuditedTable, num_asked: int | None, seed: int) -> Sample:
    """Draw the rows, check the shards that they are in, and say what to ask of each.

    What is wrong with a shard or a row before any teacher is asked is among ``problems``.
    """
    sample = Sample()
    opened = open_table(table.folder, split=None, verify=False)
    num_rows = opened.num_rows
    num_drawn = rows_needed(num_rows) if num_asked is None else min(num_asked, num_rows)
    drawn = drawn_rows(num_rows, num_drawn, seed)
    sample.problems += list(_damaged(table, opened, drawn))
    if sample.problems:
        return sample
    asked: list[_Asked] = []
    for shard, rows in _by_shard(opened, drawn):
        asked += _asked(table, opened, shard, rows, sample)
    order = np.random.default_rng([seed, 1]).permutation(len(asked))
    _set_lengths(sample, [asked[at] for at in order], num_rows)
    return sample


def _by_shard(opened: OpenTable, drawn: I64Array) -> Iterator[tuple[int, list[int]]]:
    places = defaultdict(list)
    for at in drawn.tolist():
        places[int(np.searchsorted(opened.first_row, at, side="right")) - 1].append(at)
    yield from places.items()


def _damaged(table: AuditedTable, opened: OpenTable, drawn: I64Array) -> Iterator[str]:
    """Yield what ``verify`` says of the files that are read; a store checks what it gives."""
    if isinstance(table.folder, ObjectPath):
        return
    used = {opened.shards[shard].file for shard, _ in _by_shard(opened, drawn)}
    for shard in opened.shards:
        path = table.folder / shard.file
        if not path.is_file():
            yield f"{path} is missing"
        elif (found := path.stat().st_size) != shard.num_bytes:
            yield f"{path} has {found} bytes, the manifest says {shard.num_bytes}"
        elif shard.file in used and (digest := sha256_of(path)) != shard.sha256:
            yield f"{path} has sha256 {digest[:12]}, the manifest says {shard.sha256[:12]}"
    for name, sha256 in table.manifest.files.items():
        path = table.folder / name
        if not path.is_file() or sha256_of(path) != sha256:
            yield f"{path} is missing or has changed since its manifest was written"


@dataclass(frozen=True, slots=True)
class _Asked:
    """A drawn row with both questions about it: its beginning, and all of it."""

    shard: ShardRecord
    row: int
    stored: Mapping[str, Any]
    beginning: Question
    whole: Question

    def as_sampled(self, question: Question) -> Sampled:
        is_whole = question.num_read >= self.whole.num_read
        return Sampled(self.shard, self.row, self.stored, question, is_whole)


def _asked(
    table: AuditedTable, opened: OpenTable, shard: int, drawn: list[int], sample: Sample
) -> Iterator[_Asked]:
    """Yield the drawn rows of one shard beside the rows of the input that they were made of."""
    record, first = opened.shards[shard], int(opened.first_row[shard])
    source = table.source_manifest.shards[shard_index(record.name)]
    content = with_split(read_verified(table.source / source.file, source.sha256), source.split)
    places = {key: at for at, key in enumerate(content["sample_id"].to_pylist())}
    stored = []
    for at in drawn:
        try:
            row = opened.row(at)
        except StoreError as error:
            sample.problems.append(str(error))
            return
        if row["sample_id"] not in places:
            sample.problems.append(
                f"{row['sample_id']} ({record.file} row {at - first}): there is no such sample in "
                f"{table.source / source.file}"
            )
            continue
        stored.append((at - first, row))
    if not stored:
        return
    rows = content.take(pa.array([places[row["sample_id"]] for _, row in stored]))
    context = table.context(table.models)
    both = [
        table.stage.audit.questions(table.stage, context, rows, most) for most in (FEWEST, None)
    ]
    for (number, row), beginning, whole in zip(stored, *both, strict=True):
        yield _Asked(record, number, row, beginning, whole)


def _set_lengths(sample: Sample, asked: list[_Asked], num_rows: int) -> None:
    """Read rows to their end as far as the budget goes, first rows first, and set the control."""
    if not asked:
        return
    read = [row.whole.num_read for row in asked]
    sample.capture_tokens = float(np.mean(read)) * num_rows
    left = BUDGET * _SAMPLE * sample.capture_tokens - sum(row.beginning.num_read for row in asked)
    for place, row in enumerate(asked):
        more = row.whole.num_read - row.beginning.num_read
        is_whole = more <= left or place < LEAST_WHOLE
        left -= more if is_whole else 0
        sample.rows.append(row.as_sampled(row.whole if is_whole else row.beginning))
    # The control takes the first row, which is whole, and the beginnings of others.
    rest = sorted(sample.rows[1:], key=lambda row: row.is_whole)
    sample.rows[1:] = rest
    sample.num_control = 1
    spent = sum(row.question.num_read for row in sample.rows)
    left = BUDGET * sample.capture_tokens - spent - 2 * sample.rows[0].question.num_read
    for other in rest[: MOST_CONTROL - 1]:
        left -= 2 * other.question.num_read
        if left < 0 and sample.num_control >= LEAST_CONTROL:
            break
        sample.num_control += 1
