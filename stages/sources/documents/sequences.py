"""The finished rows on disk: one file per range of ``sample_id``, train rows before held-out ones.

Within a split, rows are in the order of their ``sample_id``, a hash: a fixed shuffle of the whole
input. Files are cut into record batches of 256 rows, so a slice is read without the rest.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from schemas.errors import StoreError, first_line
from schemas.storage.files import atomic_file
from schemas.tables.documents import SPLITS, Document

ROWS = "rows"  # the folder of these files
ROWS_PER_BATCH = 256
SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.large_string()),
        pa.field("heldout", pa.bool_()),
        pa.field("input_ids", pa.large_list(pa.uint32())),
    ]
)


def range_path(work_dir: Path, number: int) -> Path:
    """Return where the rows of one range lie."""
    return work_dir / ROWS / f"range-{number:06d}.arrow"


def write_sequences(path: Path, table: pa.Table) -> None:
    """Write rows, already in order with train first, atomically."""
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with atomic_file(path) as stream, pa.ipc.new_file(stream, SCHEMA, options=options) as out:
        out.write_table(table.cast(SCHEMA).combine_chunks(), max_chunksize=ROWS_PER_BATCH)


def count_rows(path: Path) -> tuple[int, int]:
    """Return the numbers of train and of held-out rows of a file."""
    train = heldout = 0
    for batch in _batches(path, 0, None):
        in_batch = batch.column("heldout").true_count
        heldout += in_batch
        train += batch.num_rows - in_batch
    return train, heldout


def read_sequences(path: Path, start: int, stop: int) -> Iterator[Document]:
    """Yield rows ``start`` to ``stop`` of a file; raises StoreError when it is gone or torn."""
    first = start // ROWS_PER_BATCH
    for number, batch in enumerate(_batches(path, first, -(-stop // ROWS_PER_BATCH)), first):
        offset = number * ROWS_PER_BATCH
        begin, end = max(start - offset, 0), min(stop - offset, batch.num_rows)
        yield from _documents(batch.slice(begin, end - begin))


def _batches(path: Path, first: int, last: int | None) -> Iterator[pa.RecordBatch]:
    try:
        with pa.OSFile(str(path)) as stream:
            reader = pa.ipc.open_file(stream)
            for number in range(first, reader.num_record_batches if last is None else last):
                yield reader.get_batch(number)
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError(
            f"cannot read {path}: {first_line(error)}; delete {path.parent.parent} and run again"
        ) from error


def _documents(batch: pa.RecordBatch) -> Iterator[Document]:
    columns = [batch.column(name) for name in SCHEMA.names]
    for sample_id, heldout, input_ids in zip(*columns, strict=True):
        yield Document(
            sample_id=sample_id.as_py(),
            split=SPLITS[int(heldout.as_py())],
            input_ids_T=input_ids.values.to_numpy(),
        )
