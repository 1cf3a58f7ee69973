"""Where the bytes of a shard lie: what each column takes after compression, and all else.

Each buffer of each record batch is compressed once more, as Arrow wrote it; what is left of the
file is offsets' padding, record batches' messages, schema and footer.
"""

from pathlib import Path

import pyarrow as pa

ELSE = "messages, schema, footer"


def bytes_by_column(shard: Path, zstd_level: int) -> dict[str, int]:
    """Return the bytes of each column of a shard, ``ELSE`` last; they sum to the file's size."""
    codec = pa.Codec("zstd", compression_level=zstd_level)
    with pa.memory_map(str(shard)) as source:
        file = pa.ipc.open_file(source)
        sizes = dict.fromkeys(file.schema.names, 0)
        for index in range(file.num_record_batches):
            batch = file.get_batch(index)
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                sizes[name] += sum(_stored(part, codec) for part in column.buffers() if part)
    return sizes | {ELSE: shard.stat().st_size - sum(sizes.values())}


def _stored(buffer: pa.Buffer, codec: pa.Codec) -> int:
    """Arrow writes a buffer as it is where compression does not make it smaller."""
    compressed: bytes = codec.compress(buffer, asbytes=True)
    return min(int(buffer.size), len(compressed) + 8)
