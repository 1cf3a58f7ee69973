"""The rows of a data set of the hub: its files fetched into huggingface_hub's cache, then read.

``datasets`` reads a folder of links that looks as the repository does: which files are of which
configuration and split is for it to say, by the data set's card or the names. Only those of the
split are fetched, and they are fetched whole, so that a run reads all of a commit or ends.
"""

import glob
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesDict

from schemas.errors import ConfigError
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
            if name in _ABOUT:
                (folder / name).symlink_to(snapshot / name)
            else:
                (folder / name).touch()
        builder = _builder(folder, source, where)
        files = builder.config.data_files[source.split]
        wanted = [str(Path(file).relative_to(folder)) for file in files]
        snapshot = repository.fetch(source.revision, [glob.escape(name) for name in wanted])
        for name in wanted:
            (folder / name).unlink()
            (folder / name).symlink_to(snapshot / name)
        # of the other splits there are names alone, which some builders would look into
        builder.config.data_files = DataFilesDict({source.split: files})
        yield builder.as_streaming_dataset(split=source.split)


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
    splits = builder.config.data_files
    if source.split not in splits:
        raise ConfigError(
            f"{where}: it has no split '{source.split}'; there are: {', '.join(map(str, splits))}"
        )
    return builder
