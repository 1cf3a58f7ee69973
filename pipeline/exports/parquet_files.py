"""Record batches to Parquet files of bounded size, in bounded memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_BYTES = 32 << 20  # of Arrow data, before compression
FILE_BYTES = 512 << 20


def write_parquet(folder: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write ``part-00000.parquet`` and so on; return the number of rows."""
    folder.mkdir(parents=True)
    num_rows = num_files = 0
    left = iter(_groups(batches, schema))
    table = next(left, None)
    while table is not None:
        num_bytes = 0
        file = folder / f"part-{num_files:05d}.parquet"
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            while table is not None and num_bytes < FILE_BYTES:
                writer.write_table(table, row_group_size=len(table))
                num_rows, num_bytes = num_rows + len(table), num_bytes + table.nbytes
                table = next(left, None)
        num_files += 1
    return num_rows


def _groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(each.nbytes for each in held) >= ROW_GROUP_BYTES:
            yield pa.Table.from_batches(held, schema)
            held = []
    if held:
        yield pa.Table.from_batches(held, schema)
