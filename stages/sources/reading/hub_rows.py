"""The rows of a data set of the hub: its files fetched into huggingface_hub's cache, then read.

``datasets`` reads a folder of links that looks as the repository does: which files are of which
configuration and split is for it to say, by the data set's card or the names. Only those of the
split are fetched, and they are fetched whole, so that a run reads all of a commit or ends.
"""

import glob
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesDict

from schemas.errors import ConfigError, first_line
from stages.hub import Repository
from stages.sources.reading.source import HubData

_ABOUT = ("README.md", "dataset_infos.json", ".huggingface.yaml")  # what `datasets` reads of a set


@contextmanager
def hub_rows(source: HubData) -> Iterator[Any]:
    """Yield a stream of the split's rows; raises ConfigError for what is neither there nor here."""
    where = hub_name(source)
    repository = Repository(source.name, "dataset", f"hub data set '{source.name}'")
    names = repository.file_names(source.revision)
    snapshot = repository.fetch(source.revision, _ABOUT)
    with tempfile.TemporaryDirectory(prefix="teachercache-") as temporary:
        folder = Path(temporary)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        _link(folder, snapshot, [name for name in names if name in _ABOUT])
        try:
            builder = _builder(folder, source, where)
        except zipfile.BadZipFile:  # of archives alone what is in them says how they are read
            archives = [name for name in names if name.endswith(".zip")]
            whole = repository.fetch(source.revision, [glob.escape(name) for name in archives])
            _link(folder, whole, archives)
            builder = _builder(folder, source, where)
        files = builder.config.data_files[source.split]
        wanted = [str(Path(file).relative_to(folder)) for file in files]
        snapshot = repository.fetch(source.revision, [glob.escape(name) for name in wanted])
        _link(folder, snapshot, wanted)
        # of the other splits there are names alone, which some builders would look into
        builder.config.data_files = DataFilesDict({source.split: files})
        yield builder.as_streaming_dataset(split=source.split)


def _link(folder: Path, snapshot: Path, names: Iterable[str]) -> None:
    """Put files of the cache in the place of empty ones."""
    for name in names:
        (folder / name).unlink()
        (folder / name).symlink_to(snapshot / name)


def hub_name(source: HubData) -> str:
    """Return what a row's place begins with."""
    return f"hub data set '{source.name}' at {source.revision[:12]}"


def _builder(folder: Path, source: HubData, where: str) -> Any:
    """Return what `datasets` reads the configuration by; raises ConfigError where it has none."""
    try:
        builder = datasets.load_dataset_builder(str(folder), source.config)
    except ValueError as error:  # which configurations there are is in its second line
        raise ConfigError(
            f"{where}: source.config is {source.config!r}: {' '.join(str(error).split())}"
        ) from error
    except FileNotFoundError as error:  # nothing there that it reads, or that its card names
        told = first_line(error).replace(str(folder), source.name)
        raise ConfigError(f"{where}: {told}") from error
    splits = builder.config.data_files
    if source.split not in splits:
        raise ConfigError(
            f"{where}: it has no split '{source.split}'; there are: {', '.join(map(str, splits))}"
        )
    return builder
