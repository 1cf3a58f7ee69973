"""``teachercache gc``: what no given recipe needs of a root is shown, and removed when asked to.

Needed are the folders of the recipes' steps and models, and all that those are made of by what
their manifests say. Folders come from a listing of the root (``entries.py``), so nothing outside it
can be reached: what a manifest names is only ever compared with them.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from pipeline.cache.entries import Entry, Origins, entries_of
from pipeline.planning.plan import PlannedStep
from pipeline.planning.recipe import Recipe
from pipeline.state.step_lock import LOCK_FILE, is_held, step_lock
from schemas.errors import ConfigError, StoreError
from schemas.storage.files import Folder, at_once
from schemas.storage.manifest import MANIFEST
from schemas.storage.object_path import ObjectPath
from stages.models.checkpoints.checkpoint import CHECKPOINT

Plans = Sequence[tuple[Recipe, Sequence[PlannedStep]]]


@dataclass(frozen=True, slots=True)
class Garbage:
    """The folders of a root: kept ones, those that go, and those that a run is writing.

    ``torn`` are kept ones that nobody writes and in which killed runs left temporary files.
    """

    kept: list[Entry]
    unneeded: list[Entry]
    unfinished: list[Entry]
    torn: list[Entry]
    held: list[Entry]

    @property
    def num_bytes(self) -> int:
        """What is freed."""
        folders = sum(entry.files.num_bytes for entry in (*self.unneeded, *self.unfinished))
        return folders + sum(sum(entry.files.temporary.values()) for entry in self.torn)


def collect(console: Console, root: Folder, plans: Plans, *, delete: bool) -> None:
    """Print what goes, by why; with ``delete`` remove it.

    Raises ConfigError for a recipe of another root, and StoreError, before anything is removed,
    while a run writes a step that no recipe names: it may be reading what would go.
    """
    root = root if isinstance(root, ObjectPath) else root.resolve()
    found = garbage_of(root, plans)
    if delete and found.held:
        raise StoreError(
            f"{found.held[0].folder} is being written by a run, and no given recipe has that step: "
            f"wait for its end, or name its recipe by --keep"
        )
    _say(console, "not needed", map(_described, found.unneeded))
    _say(console, "unfinished, not needed", map(_described, found.unfinished))
    _say(console, "temporary files of killed runs", map(_temporary, found.torn))
    _say(console, "being written by a run that is of no given recipe", map(_described, found.held))
    if delete:
        for entry in (*found.unneeded, *found.unfinished):
            _remove(entry)
        for entry in found.torn:
            _remove_temporary(entry)
    kept = decimal(sum(entry.files.num_bytes for entry in found.kept))
    size = decimal(found.num_bytes)
    done = f"{size} freed" if delete else f"{size} would be freed, --delete does it"
    _print(console, f"{root}: {done}; {len(found.kept)} folders kept, {kept}")


def garbage_of(root: Folder, plans: Plans) -> Garbage:
    """Part the folders of a root by whether the recipes need them; nothing is changed."""
    entries = entries_of(root)
    origins = Origins(entries)
    waiting: list[Entry] = []
    for recipe, plan in plans:
        places = list(_places(recipe, plan))
        used = [entry for entry in entries if any(_is_in(place, entry.folder) for place in places)]
        if not used and _whole(recipe.execution.root) != root:
            raise ConfigError(
                f"recipe '{recipe.name}' makes its steps in {recipe.execution.root} and reads "
                f"nothing of {root}: name recipes of the root that is cleaned"
            )
        waiting.extend(used)
    needed: dict[str, Entry] = {}
    while waiting:
        entry = waiting.pop()
        if entry.name not in needed:
            needed[entry.name] = entry
            waiting.extend(origins.of(entry))
    garbage = Garbage(list(needed.values()), [], [], [], [])
    for entry in entries:
        if entry.name in needed:
            if entry.files.temporary and not is_held(entry.folder):
                garbage.torn.append(entry)
        elif is_held(entry.folder):
            garbage.held.append(entry)
        else:
            is_unfinished = entry.state == "unfinished"
            (garbage.unfinished if is_unfinished else garbage.unneeded).append(entry)
    return garbage


def _places(recipe: Recipe, plan: Sequence[PlannedStep]) -> Iterator[Folder]:
    """Yield each folder that a recipe makes or reads."""
    for step in plan:
        yield _whole(step.place)
        for model in step.models.values():
            yield from (_whole(folder) for folder in (model.base, model.adapter) if folder)
    for ref in recipe.models.values():
        yield from (_whole(Path(path).expanduser()) for path in (ref.path, ref.adapter) if path)


def _whole(folder: Folder) -> Folder:
    return folder if isinstance(folder, ObjectPath) else folder.resolve()


def _is_in(place: Folder, folder: Folder) -> bool:
    if isinstance(place, ObjectPath) or isinstance(folder, ObjectPath):
        return f"{place}/".startswith(f"{folder}/")
    return place == folder or folder in place.parents


def _remove(entry: Entry) -> None:
    """Remove a folder, first the file that says it is finished; raises StoreError where held."""
    folder = entry.folder
    if isinstance(folder, ObjectPath):
        with step_lock(folder):
            folder.abort_uploads()
            for path in (folder / MANIFEST, folder / CHECKPOINT):
                path.unlink()
            at_once(ObjectPath.unlink, [path for path in folder.find() if path.name != LOCK_FILE])
        return
    try:
        with _locked(folder):
            for name in (MANIFEST, CHECKPOINT):
                (folder / name).unlink(missing_ok=True)
            with os.scandir(folder) as found:
                children = list(found)
            for child in children:  # of a link the link alone
                if child.is_dir(follow_symlinks=False):
                    shutil.rmtree(child.path)
                else:
                    os.unlink(child.path)
            folder.rmdir()
    except OSError as error:
        raise StoreError(
            f"cannot remove {folder}: {error.strerror or error}; open it and run again"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a step's lock, which must be a file of its own: a holder's name is written there."""
    for lock in folder.glob(".l*"):
        if lock.is_symlink():
            lock.unlink()
    with step_lock(folder):
        yield


def _remove_temporary(entry: Entry) -> None:
    folder = entry.folder
    if isinstance(folder, ObjectPath):
        return  # an object is there whole or not at all
    with _locked(folder):
        for name in entry.files.temporary:
            (folder / name).unlink(missing_ok=True)


def _described(entry: Entry) -> str:
    notes = (entry.what, entry.state, entry.made_by and f"made by {entry.made_by}")
    size = decimal(entry.files.num_bytes)
    return f"{entry.name}  {size}  {', '.join(note for note in notes if note)}"


def _temporary(entry: Entry) -> str:
    temporary = entry.files.temporary
    return f"{entry.name}  {decimal(sum(temporary.values()))}  {', '.join(sorted(temporary))}"


def _say(console: Console, what: str, lines: Iterator[str]) -> None:
    found = list(lines)
    if found:
        _print(console, f"{what}:")
    for line in found:
        _print(console, f"  {line}")


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)
