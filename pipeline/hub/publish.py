"""Publish finished tables as a data set of the hub: one commit, so that they are there whole.

What goes up is what a reader needs: manifest, list of shards, shards, side files and what the
columns are. Records (who made a shard, when) and lists of rejected records, which name files of
this machine, stay here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.hub.card import CARD, audit_line, audits_in, card_of, given_in
from pipeline.hub.errors import in_one_line
from pipeline.state.audit_verdict import verdict_of
from schemas.errors import ConfigError, StoreError
from schemas.storage.files import Folder
from schemas.storage.manifest import MANIFEST, Manifest, damaged_shards, read_manifest
from schemas.storage.schema_file import SCHEMA_FILE
from schemas.storage.shard_list import SHARD_LIST


@dataclass(frozen=True, slots=True)
class Published:
    """Where tables lie on the hub, and what their manifests say of this machine's paths."""

    url: str
    commit: str
    num_bytes: int
    paths: tuple[str, ...]


def publish(
    name: str,
    folders: Sequence[Folder],
    *,
    private: bool,
    licence: str | None,
    teacher: str | None,
) -> Published:
    """Upload tables to ``name`` (owner/name), beside what is there; equal ones change nothing.

    Raises ConfigError for a name, token or folder that cannot serve, StoreError for damaged tables
    and a hub that cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    tables = _tables(folders)
    api = HfApi()
    with in_one_line(name, "publish"):
        api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
        all_tables = _there(api, name) | {
            place: manifest for place, (_, manifest) in tables.items()
        }
        before = _card_there(api, name)
        given = given_in(before)
        card = card_of(
            name,
            all_tables,
            licence=licence or given[0],
            teacher=teacher or given[1],
            audits=_audits(before, all_tables, tables),
        )
        files = [
            (f"{place}/{path.name}", path)
            for place, (folder, manifest) in tables.items()
            for path in _files(folder, manifest)
        ]
        operations = [CommitOperationAdd(place, path) for place, path in files]
        done = api.create_commit(
            name,
            [*operations, CommitOperationAdd(CARD, card.encode())],
            commit_message=f"{', '.join(tables)}",
            repo_type="dataset",
        )
    return Published(
        url=f"{api.endpoint}/datasets/{name}",
        commit=done.oid,
        num_bytes=sum(path.stat().st_size for _, path in files),
        paths=tuple(found for _, manifest in tables.values() for found in _paths(manifest)),
    )


def _tables(folders: Sequence[Folder]) -> dict[str, tuple[Path, Manifest]]:
    """Return whole tables by what their folders are called in a root: TABLE/FINGERPRINT."""
    tables: dict[str, tuple[Path, Manifest]] = {}
    for folder in folders:
        if not isinstance(folder, Path):
            raise ConfigError(
                f"{folder} is in an object store, tables are published from this machine: copy it "
                f"to a folder here"
            )
        manifest = read_manifest(folder)
        if damaged := damaged_shards(folder, manifest):
            raise StoreError(f"{damaged[0]}; run its recipe again before it is published")
        tables[f"{manifest.table}/{manifest.fingerprint[:12]}"] = folder, manifest
    return tables


def _audits(
    card: str, there: Mapping[str, Manifest], tables: Mapping[str, tuple[Path, Manifest]]
) -> dict[str, str]:
    """Return what is known of audits: of these tables what lies beside them, else by the card."""
    kept = {
        place: line
        for place, line in audits_in(card).items()
        if place in there and place not in tables
    }
    verdicts = {
        place: verdict_of(folder, manifest.dataset_id)
        for place, (folder, manifest) in tables.items()
    }
    return kept | {place: audit_line(place, found) for place, found in verdicts.items() if found}


def _files(folder: Path, manifest: Manifest) -> Iterator[Path]:
    names = (MANIFEST, SHARD_LIST, *manifest.files, *(shard.file for shard in manifest.shards))
    yield from (folder / file for file in names)
    if (folder / SCHEMA_FILE).is_file():
        yield folder / SCHEMA_FILE


def _there(api: Any, name: str) -> dict[str, Manifest]:
    """Return the tables that a data set has already."""
    found = {}
    for file in api.list_repo_files(name, repo_type="dataset"):
        place, _, last = file.rpartition("/")
        if last == MANIFEST and place.count("/") == 1:
            for needed in (f"{place}/{SHARD_LIST}", file):
                local = Path(api.hf_hub_download(name, needed, repo_type="dataset"))
            found[place] = read_manifest(local.parent)
    return found


def _card_there(api: Any, name: str) -> str:
    if not api.file_exists(name, CARD, repo_type="dataset"):
        return ""
    return Path(api.hf_hub_download(name, CARD, repo_type="dataset")).read_text(encoding="utf-8")


def _paths(value: Any) -> Iterator[str]:
    """Yield what looks like a path of this machine in what a manifest says of its making."""
    if isinstance(value, Manifest):
        value = dict(value.identity)
    if isinstance(value, dict):
        for item in value.values():
            yield from _paths(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, str) and value.startswith(("/", "~")) and "/" in value[1:]:
        yield value
