"""A synthetic root of very many shards, without rows: a finished input, a step begun."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.manifest import Manifest, shard_name, write_manifest
from schemas.shard_list import SCHEMA, ShardList
from tests.tiny_recipe import TinyRecipe, make_recipe

LINKS = 20_000  # names of one empty file: a name costs a tenth of a file, and lists the same
ROWS, TOKENS, BYTES = 1000, 1_000_000, 2_100_000  # of one shard


def make_many_shards(folder: Path, model: Path, num_shards: int) -> TinyRecipe:
    """Write what an ingest of ``num_shards`` leaves, and names of half of the next step."""
    recipe = make_recipe(folder, model, ["a text that nobody reads"])
    documents, signals = recipe.plan()
    manifest = Manifest(
        table="documents",
        version=1,
        variant="",
        fingerprint=documents.fingerprint,
        tokenizer=documents.tokenizer,
        vocab_size=int(documents.identity["vocab_size"]),
        identity=documents.identity,
        shards=shard_list(num_shards),
    )
    documents.folder.mkdir(parents=True)
    write_manifest(documents.folder, manifest)
    signals.folder.mkdir(parents=True)
    for index in range(num_shards // 2):
        stem = signals.folder / shard_name(index, num_shards)
        if index % LINKS == 0:
            empty = f"{stem}.arrow"
            Path(empty).touch()
        else:
            os.link(empty, f"{stem}.arrow")
        os.link(empty, f"{stem}.json")
    return recipe


def shard_list(num_shards: int) -> ShardList:
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
