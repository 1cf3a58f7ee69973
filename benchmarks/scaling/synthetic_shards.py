"""A list of very many shards that nobody wrote: all of one size, each with its own checksum."""

import hashlib

import numpy as np
import pyarrow as pa

from schemas.storage.shard_list import SCHEMA, ShardList

ROWS, TOKENS, BYTES = 1000, 1_000_000, 2_100_000  # of one shard


def synthetic_shards(num_shards: int) -> ShardList:
    """Return shards of one size, each with a checksum of its own; one in ten has a reject."""
    rejects = [[("too_long", 1)] if index % 10 == 0 else [] for index in range(num_shards)]
    columns = {
        "split": np.where(np.arange(num_shards) % 50 == 0, "heldout", "train"),
        "num_rows": np.full(num_shards, ROWS),
        "num_tokens": np.full(num_shards, TOKENS),
        "num_positions": np.zeros(num_shards, int),
        "num_bytes": np.full(num_shards, BYTES),
        "sha256": [hashlib.sha256(b"%d" % index).digest() for index in range(num_shards)],
        "rejects": rejects,
    }
    arrays = [pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names]
    return ShardList.of_columns(pa.Table.from_arrays(arrays, schema=SCHEMA))
