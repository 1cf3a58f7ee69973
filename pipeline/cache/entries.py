"""What lies in a root: each table, checkpoint and report of it, and which of them it is made of.

A root's folders are ``<group>/<address>``: the name of a table, ``checkpoints`` or ``evaluations``,
and the first digits of a fingerprint. Nothing else is looked at, and no link is followed. What
manifests and records say is compared with what lies there and never taken as a path.
"""

import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.planning.fingerprint import ADDRESS_DIGITS
from pipeline.planning.recipe import Recipe
from pipeline.state.audit_state import NONE, audit_state
from pipeline.state.audit_verdict import AUDIT
from pipeline.state.extension_record import EXTENSION, PLAN, read_plan
from schemas.errors import ConfigError, TeacherCacheError
from schemas.storage.files import Folder
from schemas.storage.manifest import MANIFEST, read_manifest
from schemas.storage.object_path import ObjectPath
from schemas.storage.records import read_notes
from schemas.tables import TABLES
from stages.models.checkpoints.checkpoint import CHECKPOINT, read_record

GROUPS = (*sorted({table for table, _ in TABLES}), "checkpoints", "evaluations")
_ADDRESS = re.compile(rf"[0-9a-f]{{{ADDRESS_DIGITS}}}")
_SHARD = re.compile(r"shard-\d+-of-\d+\.(arrow|json|rejects\.jsonl)")
_TEMPORARY = re.compile(r".+\.tmp-[0-9a-f]{12}")  # as ``schemas.storage.files`` names them

State = Literal["complete", "unfinished", "damaged"]


@dataclass(slots=True)
class Files:
    """What one folder holds, counted: bytes of all files, and those that tell its state."""

    num_bytes: int = 0
    num_shards: int = 0
    shard_bytes: int = 0
    first_record: str = ""
    finished_by: str = ""  # the file that says it is: a manifest or a checkpoint's record
    sizes: dict[str, int] = field(default_factory=dict)  # of checkpoints' files and side files
    temporary: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, num_bytes: int) -> None:
        """Count a file, named below the folder."""
        self.num_bytes += num_bytes
        if _TEMPORARY.fullmatch(name.rsplit("/", 1)[-1]):
            self.temporary[name] = num_bytes
        elif match := _SHARD.fullmatch(name):
            if match[1] == "json":
                self.first_record = min(self.first_record or name, name)
            elif match[1] == "arrow":
                self.num_shards += 1
                self.shard_bytes += num_bytes
        else:
            self.sizes[name] = num_bytes
            if name in (MANIFEST, CHECKPOINT):
                self.finished_by = name


@dataclass(frozen=True, slots=True)
class Entry:
    """A table, checkpoint or report: what it is, how far it is, and what it says it is made of.

    ``what`` is a table's variant or the stage that left the folder. Counts are None where nothing
    whole says them. ``weights`` are the checksums of a checkpoint's files, ``copies`` the
    fingerprints of tables that an extension which was begun copies rows of.
    """

    folder: Folder
    files: Files
    state: State
    why: str = ""
    what: str = ""
    fingerprint: str = ""
    dataset_id: str = ""
    weights: frozenset[str] = frozenset()
    identity: Mapping[str, Any] = field(default_factory=dict)
    num_rows: int | None = None
    num_tokens: int | None = None
    num_positions: int | None = None
    made_by: str = ""
    audit: str = NONE
    copies: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its place below the root: ``teacher_logits/0123456789ab``."""
        return f"{self.folder.parent.name}/{self.folder.name}"


def entries_of(root: Folder) -> list[Entry]:
    """Look at each folder of a root, by group and address; raises ConfigError where none is."""
    found = _files_in_store(root) if isinstance(root, ObjectPath) else _files_here(root)
    entries = [_entry(folder, files) for folder, files in found]
    if not entries:
        raise ConfigError(
            f"{root} holds no table and no checkpoint: expected a recipe, or the root of one, with "
            f"folders such as documents/0123456789ab"
        )
    return sorted(entries, key=lambda entry: (GROUPS.index(entry.folder.parent.name), entry.name))


def _files_here(root: Path) -> Iterator[tuple[Folder, Files]]:
    for group in GROUPS:
        for folder in _folders(root / group):
            if _ADDRESS.fullmatch(folder.name):
                files = Files()
                for path, num_bytes in _walked(folder):
                    files.add(path.relative_to(folder).as_posix(), num_bytes)
                yield folder, files


def _folders(parent: Path) -> list[Path]:
    if parent.is_symlink() or not parent.is_dir():
        return []
    with os.scandir(parent) as entries:
        return [parent / entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _walked(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the files below a folder; links are files of no size, whatever they lead to."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            try:
                found = path.lstat()
            except FileNotFoundError:  # a run at work has just given it its name
                continue
            yield path, found.st_size if stat.S_ISREG(found.st_mode) else 0


def _files_in_store(root: ObjectPath) -> Iterator[tuple[Folder, Files]]:
    found: dict[ObjectPath, Files] = defaultdict(Files)
    for path, num_bytes in objects_below(root):
        group, address, name = path.url.removeprefix(f"{root.url}/").split("/", 2)
        found[root / group / address].add(name, num_bytes)
    yield from found.items()


def objects_below(root: ObjectPath) -> Iterator[tuple[ObjectPath, int]]:
    """Yield the objects of a root's folders, and their bytes."""
    for path, num_bytes in root.find().items():
        parts = path.url.removeprefix(f"{root.url}/").split("/")
        is_below = path.url.startswith(f"{root.url}/") and len(parts) > 2
        if is_below and parts[0] in GROUPS and _ADDRESS.fullmatch(parts[1]) and ".." not in parts:
            yield path, num_bytes


def _entry(folder: Folder, files: Files) -> Entry:
    made_by = _maker(folder, files)
    try:
        if files.finished_by == MANIFEST:
            return _table(folder, files, made_by)
        if files.finished_by == CHECKPOINT:
            return _checkpoint(folder, files)
    except (TeacherCacheError, TypeError, ValueError, AttributeError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        return Entry(folder, files, "damaged", why, made_by=made_by)
    why = f"{files.num_shards} shards" if files.num_shards else "nothing that is whole"
    plan = read_plan(folder / EXTENSION) if f"{EXTENSION}/{PLAN}" in files.sizes else None
    copies = tuple(source.fingerprint for source in plan.sources) if plan else ()
    return Entry(folder, files, "unfinished", why, made_by=made_by, copies=copies)


def _table(folder: Folder, files: Files, made_by: str) -> Entry:
    manifest = read_manifest(folder)
    problem = _other_address(folder, manifest.fingerprint)
    totals = manifest.shard_list.totals
    if files.num_shards != totals.num_shards or files.shard_bytes != totals.num_bytes:
        problem = problem or (
            f"{files.num_shards:,} shards of {files.shard_bytes:,} bytes, its manifest says "
            f"{totals.num_shards:,} of {totals.num_bytes:,}: `teachercache repair` makes them again"
        )
    problem = problem or _missing(manifest.files, files)
    return Entry(
        folder,
        files,
        "damaged" if problem else "complete",
        problem,
        manifest.variant,
        manifest.fingerprint,
        manifest.dataset_id,
        identity=dict(manifest.identity),
        num_rows=totals.num_rows,
        num_tokens=totals.num_tokens,
        num_positions=totals.num_positions,
        made_by="import" if manifest.identity.get("stage") == "import" else made_by,
        audit=audit_state(folder, manifest.dataset_id).outcome if AUDIT in files.sizes else NONE,
    )


def _checkpoint(folder: Folder, files: Files) -> Entry:
    record = read_record(folder)
    problem = _other_address(folder, record.fingerprint) or _missing(record.files, files)
    identity = dict(record.identity)
    return Entry(
        folder,
        files,
        "damaged" if problem else "complete",
        problem,
        str(identity.get("stage", "train")),  # whose identity says what it was given by content
        record.fingerprint,
        weights=frozenset(map(str, record.files.values())),
        identity=identity,
    )


def _other_address(folder: Folder, fingerprint: str) -> str:
    if fingerprint[:ADDRESS_DIGITS] == folder.name:
        return ""
    return f"it says it is {fingerprint[:ADDRESS_DIGITS]}, which is not where it lies"


def _missing(names: Iterable[str], files: Files) -> str:
    gone = [name for name in names if name not in files.sizes]
    return f"{len(gone)} of its files are missing (first: {gone[0]})" if gone else ""


def _maker(folder: Folder, files: Files) -> str:
    """Return ``recipe/step`` as the first shard's record has it; it may have been made since."""
    if not files.first_record:
        return ""
    body = read_notes(folder, files.first_record.removesuffix(".json")) or {}
    notes = body.get("notes")
    if not isinstance(notes, dict):
        return ""
    recipe, step = str(notes.get("recipe", "")), str(notes.get("step", ""))
    is_named = re.fullmatch(Recipe.NAME_PATTERN, recipe) and step.isprintable()
    return f"{recipe}/{step}" if is_named else ""


class Origins:
    """Finds what an entry is made of among the others of its root, by content."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        """Index what can be named: fingerprints, ids of data sets, checksums of weights."""
        self._by_fingerprint = {entry.fingerprint: entry for entry in entries if entry.fingerprint}
        self._by_dataset = {entry.dataset_id: entry for entry in entries if entry.dataset_id}
        self._checkpoints = [entry for entry in entries if entry.weights]

    def of(self, entry: Entry) -> list[Entry]:
        """Return the tables and checkpoints of the root that an entry says it is made of."""
        identity = entry.identity
        models = [model for model in _list(identity.get("models")) if isinstance(model, Mapping)]
        names = [*_list(identity.get("inputs")), *(model.get("step") for model in models)]
        names += entry.copies
        found = [self._by_fingerprint.get(name) for name in names if isinstance(name, str)]
        ids = [*_list(identity.get("data")), *_list(identity.get("lm_data"))]
        found += [self._by_dataset.get(name) for name in ids if isinstance(name, str)]
        found += [self._with_weights(identity.get(key)) for key in ("student", "adapter", "reader")]
        there = {other.name: other for other in found if other is not None and other is not entry}
        return list(there.values())

    def _with_weights(self, checksums: Any) -> Entry | None:
        """Return the checkpoint with all of these files; training names its student so."""
        if not isinstance(checksums, Mapping) or not checksums:
            return None
        wanted = set(map(str, checksums.values()))
        return next((entry for entry in self._checkpoints if wanted <= entry.weights), None)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
