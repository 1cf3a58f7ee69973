"""A synthetic root of very many shards, without rows: a finished input, a step begun."""

import os
from pathlib import Path

from benchmarks.synthetic_shards import synthetic_shards
from schemas.storage.manifest import Manifest, write_manifest
from schemas.storage.records import shard_name
from tests.tiny_recipe import TinyRecipe, make_recipe

LINKS = 20_000  # names of one empty file: a name costs a tenth of a file, and lists the same


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
        shards=synthetic_shards(num_shards),
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
