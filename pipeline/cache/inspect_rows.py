"""A readable look at rows: the text, and at each position what the teacher thought."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.text import Text

from pipeline.cache.pair_views import Decode
from pipeline.cache.row_views import Look, scored_tokens, view_of
from schemas.errors import ConfigError, StoreError
from schemas.open_table import known_table, open_table
from schemas.storage.files import Folder, sha256_of
from schemas.storage.manifest import Manifest, read_manifest
from schemas.storage.shard_cache import local_file
from schemas.storage.shards import read_shard
from schemas.table import Table
from schemas.tables.teacher_logits import EXACT_INT8
from stages.models.checkpoints.checkpoint import CHECKPOINT
from stages.models.checkpoints.tokenizer import open_tokenizer
from stages.models.checkpoints.tokenizer_identity import tokenizer_fingerprint
from stages.signals.teacher_logits.calibration import CALIBRATION, read_calibration
from stages.signals.teacher_logits.rounding_cost import MOST_RECORDS, read_rounding_cost


def inspect_rows(
    console: Console,
    folder: Folder,
    *,
    first: int,
    count: int,
    positions: int,
    top: int,
    tokenizer: Path | None,
    signals: Folder | None = None,
) -> None:
    """Print rows ``first`` .. ``first + count - 1`` of a finished table.

    ``signals`` is a table of the teacher's about them: each token that it scored is shown too.
    """
    _refuse_other_places(folder)
    manifest = read_manifest(folder)
    table = known_table(manifest, folder)
    look = Look(_decoder(tokenizer), positions, top)
    calibration = read_calibration(folder) if CALIBRATION in manifest.files else None
    names = [shard.name for shard in islice(manifest.shards, MOST_RECORDS)]
    rounding = read_rounding_cost(folder, names) if manifest.variant == EXACT_INT8.variant else None
    console.print(
        f"{manifest.table} {manifest.variant} version {manifest.version}, "
        f"{manifest.num_rows} rows, vocabulary {manifest.vocab_size}, "
        f"fingerprint {manifest.fingerprint[:12]}"
        + "".join(f", {found}" for found in (calibration, rounding) if found is not None),
        highlight=False,
        soft_wrap=True,
    )
    rows = list(islice(_rows_from(folder, manifest, table, first), count))
    if not rows:
        raise ConfigError(f"{folder} has {manifest.num_rows} rows, there is no row {first}")
    found = None if signals is None else _Signals(signals)
    for index, (split, row) in enumerate(rows, start=first):
        console.print(f"\nrow {index}  sample_id {row.sample_id}  split {split}", highlight=False)
        for part in view_of(manifest.table, row, look):
            console.print(part)
        if found is not None:
            console.print(found.view_of(row, look))


class _Signals:
    """A teacher's signals about the rows that are shown, found by ``sample_id``."""

    def __init__(self, folder: Folder) -> None:
        self.opened = open_table(folder, split=None, verify=False)
        if (table := self.opened.manifest.table) != "teacher_logits":
            raise ConfigError(f"--signals {folder} is a table of {table}, expected teacher_logits")
        self.keys = self.opened.sample_ids()

    def view_of(self, row: Any, look: Look) -> RenderableType:
        places = np.flatnonzero(self.keys == row.sample_id.encode())
        if not len(places):
            return Text(f"{self.opened.folder} has no row of it: rejected there, or not about it")
        signal = self.opened.table.row(**self.opened.row(int(places[0])))
        return scored_tokens(row, signal, look)


def _refuse_other_places(folder: Folder) -> None:
    """Raise ConfigError for what is there and can never become a table."""
    what, recipe = "", "RECIPE"
    if isinstance(folder, Path) and folder.is_file():
        what, recipe = "a file", str(folder)
    elif any((folder / name).is_file() for name in (CHECKPOINT, "config.json")):
        what = "a model or a report"
    if what:
        raise ConfigError(
            f"{folder} is {what}, expected the folder of a finished table: "
            f"`teachercache show {recipe}` names those of a recipe"
        )


def _rows_from(folder: Folder, manifest: Manifest, table: Table[Any], first: int) -> Any:
    skipped = 0
    for shard in manifest.shards:
        if skipped + shard.num_rows <= first:
            skipped += shard.num_rows
            continue
        with local_file(folder / shard.file, shard.sha256) as file:
            if file.is_file() and sha256_of(file) != shard.sha256:
                raise StoreError(
                    f"{file} has changed since it was written: `teachercache verify {folder}` says "
                    f"what mends it"
                )
            content = read_shard(file)
        for batch in content.to_batches():
            for row in table.rows(batch):
                if skipped >= first:
                    yield shard.split, row
                skipped += 1


def _decoder(tokenizer: Path | None) -> Decode:
    if tokenizer is None:
        return lambda ids: " ".join(str(int(token)) for token in ids)
    tokenizer_fingerprint(tokenizer)  # raises ConfigError where there is no tokenizer
    loaded = open_tokenizer(tokenizer)  # loads transformers
    return lambda ids: str(loaded.decode([int(token) for token in ids]))
