"""The manifest, which makes a table complete.

Each shard has a JSON record, written after the shard. From the records come ``shards.feather``, the
list of all shards, and then ``manifest.json``, last: a table is complete when that exists and every
shard of its list verifies. The manifest itself stays small, whatever the number of shards: it has
their totals, and the sha256 of the list. Timings stay in the records, so that equal tables have
byte-identical manifests.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import SchemaMismatch, StoreError
from .files import Folder, read_if_there, require_below, sha256_of, write_text
from .records import ShardRecord
from .shard_list import ShardList, ShardTotals

MANIFEST = "manifest.json"
FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A complete table: what it is, what made it, and its shards in order (kept as columns).

    ``identity`` is the whole document whose hash is ``fingerprint``: stage, version, config, model
    and inputs. ``tokenizer`` is the fingerprint of the tokenizer whose ids the table holds, and
    ``vocabulary`` of what decides which ids a piece of text has ("" in tables of before 0.2.0).
    ``measures`` are numbers about all rows that a stage took of them, where it takes any.
    """

    table: str
    version: int
    variant: str
    fingerprint: str
    tokenizer: str
    vocab_size: int
    identity: Mapping[str, Any]
    shards: Sequence[ShardRecord]
    vocabulary: str = ""
    source_rejects: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Keep the shards as columns."""
        if not isinstance(self.shards, ShardList):
            object.__setattr__(self, "shards", ShardList.of(self.shards))

    @property
    def shard_list(self) -> ShardList:
        """The shards, as columns."""
        assert isinstance(self.shards, ShardList)
        return self.shards

    def has_ids_of(self, tokenizer: str, vocabulary: str) -> bool:
        """Whether the rows' ids are those of a tokenizer, given its two fingerprints.

        Tokenizers of one vocabulary may differ in chat template and special tokens, as those of an
        instruct model and of its base model do.
        """
        return tokenizer == self.tokenizer or (vocabulary == self.vocabulary and vocabulary != "")

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return self.shard_list.totals.num_rows

    @property
    def num_tokens(self) -> int:
        """Input tokens of all shards."""
        return self.shard_list.totals.num_tokens

    @property
    def num_positions(self) -> int:
        """Scored positions of all shards."""
        return self.shard_list.totals.num_positions

    @property
    def num_bytes(self) -> int:
        """Bytes of all Arrow files of rows."""
        return self.shard_list.totals.num_bytes

    @property
    def rejects(self) -> dict[str, int]:
        """Rejected rows by reason, over the source and all shards."""
        total = Counter(self.source_rejects) + Counter(self.shard_list.totals.rejects)
        return dict(sorted(total.items()))

    @property
    def dataset_id(self) -> str:
        """A hash over the shards' checksums in order: equal tables, equal ids, on any machine."""
        digest = hashlib.sha256(self.fingerprint.encode())
        digest.update(self.shard_list.checksums())
        return digest.hexdigest()


_OWN_FIELDS = [item.name for item in fields(Manifest) if item.name != "shards"]


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write the list of shards and then ``manifest.json``: the step's last act."""
    manifest.shard_list.write(folder)
    body = {
        "format": FORMAT,
        "dataset_id": manifest.dataset_id,
        "totals": asdict(manifest.shard_list.totals),
        **{name: getattr(manifest, name) for name in _OWN_FIELDS},
    }
    if not manifest.measures:  # as it is of most tables, and was of all
        del body["measures"]
    write_text(folder / MANIFEST, json.dumps(body, indent=1, sort_keys=True) + "\n")


def read_manifest(folder: Folder) -> Manifest:
    """Read a complete table's manifest; raises StoreError when there is none or it is damaged.

    The list of shards is opened, and held to the manifest, when a shard is first asked for.
    """
    manifest = manifest_if_there(folder)
    if manifest is None:
        if not folder.is_dir():
            state = "does not exist"
        elif isinstance(folder, Path) and not next(folder.glob("*.arrow"), None):
            state = "holds no table"  # nor a part of one
        else:
            state = "is not finished"
        raise StoreError(
            f"{folder} {state}: it has no {MANIFEST}; run the recipe that makes it "
            f"(`teachercache run`) and try again"
        )
    return manifest


def manifest_if_there(folder: Folder) -> Manifest | None:
    """Return a table's manifest, None for a table that is not complete: on a store, one GET."""
    path = folder / MANIFEST
    text = read_if_there(path)
    if text is None:
        return None
    try:
        body = json.loads(text)
        if (found := body["format"]) != FORMAT:
            raise SchemaMismatch(
                f"{path} has format {found}, this version reads format {FORMAT}: delete it and "
                f"run the recipe again (finished shards are kept), or use the other version"
            )
        body.setdefault("vocabulary", "")
        body.setdefault("measures", {})
        require_below(body["files"])
        shards = ShardList.in_folder(folder, ShardTotals(**body["totals"]))
        return Manifest(shards=shards, **{name: body[name] for name in _OWN_FIELDS})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(
            f"{path} is damaged ({error}): delete it and run the recipe again"
        ) from error


def damaged_shards(folder: Folder, manifest: Manifest) -> list[str]:
    """Return one line for each shard or file that is missing or whose bytes have changed."""
    expected = ((shard.file, shard.sha256) for shard in manifest.shards)
    problems = []
    for name, sha256 in chain(expected, manifest.files.items()):
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif (found := sha256_of(path)) != sha256:
            problems.append(f"{path} has sha256 {found[:12]}, the manifest says {sha256[:12]}")
    return problems
