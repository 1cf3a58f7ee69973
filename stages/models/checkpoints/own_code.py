"""Model folders that bring code of their own (``auto_map``): it runs only where a recipe says so.

A recipe's ``models.NAME.trust_remote_code`` is what transformers and vLLM call by that name. Which
folders are trusted is known to a process from the moment it plans the recipe or opens one of its
stages (``trust``). Whatever opens a model folder asks here, so that nothing runs a folder's code by
a default, and nobody is asked at a prompt. Needs no torch.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError

_CONFIG = "config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_trusted: set[Path] = set()


def trust(folder: Path, allowed: bool) -> None:
    """Say whether this process may run the code that a model folder brings."""
    if allowed:
        _trusted.add(folder.resolve())
    else:
        _trusted.discard(folder.resolve())


def is_trusted(folder: Path) -> bool:
    """Whether this process may run the code that a model folder brings."""
    return folder.resolve() in _trusted


def code_files(folder: Path) -> list[Path]:
    """Return the Python files of a model folder, which its identity has when they are trusted."""
    found = ((path, path.relative_to(folder).parts) for path in sorted(folder.rglob("*.py")))
    return [path for path, parts in found if not any(part.startswith(".") for part in parts)]


def check_trust(folder: Path, setting: bool | None, place: str) -> None:
    """Refuse, in one line, a folder of a recipe whose own code is not spoken of, or not there.

    ``place`` is the model's in the recipe. True needs code that lies in the folder. False is the
    libraries' own class for its ``model_type``, None is allowed where there is nothing to decide.
    """
    here: list[str] = []
    elsewhere: list[str] = []
    for module in _modules(folder, _CONFIG):
        (here if (folder / module).is_file() else elsewhere).append(module)
    if setting is None and here:
        raise ConfigError(
            f"{place}: {folder} brings code of its own ({', '.join(here)}, by auto_map in its "
            f"{_CONFIG}), which runs only where the recipe says so: read it, then set "
            f"{place}.trust_remote_code: true (or false, for the libraries' own class of its "
            f"model_type)"
        )
    if not setting or not (folder / _CONFIG).is_file():
        return
    if elsewhere:
        raise ConfigError(
            f"{place}.trust_remote_code: {folder} takes its code from {elsewhere[0]}, which is not "
            f"in the folder: put the file there and name it without its repository in auto_map "
            f"({_CONFIG})"
        )
    if not here and not any(_modules(folder, _TOKENIZER_CONFIG)):
        raise ConfigError(
            f"{place}.trust_remote_code: {folder} brings no code of its own (no auto_map in its "
            f"{_CONFIG} or {_TOKENIZER_CONFIG}): leave the setting out"
        )


def open_pretrained(kind: Any, folder: Path, **settings: Any) -> Any:
    """Return what ``kind.from_pretrained`` makes of a model folder, never from the network.

    Raises ValueError, in one line, where the folder's own code is needed and not trusted, or is
    trusted and fails, ConfigError for weights that are more than tensors; else what transformers
    raises.
    """
    trusted = is_trusted(folder)
    try:
        opened = kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusted, **settings
        )
        if trusted:
            _require_own(kind, folder, opened)
    except Exception as error:
        if is_pickle_refused(error):
            raise more_than_tensors(folder) from error
        if trusted:  # code of others may raise anything
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"its own code does not open it: {type(error).__name__}: {reason}"
            ) from error
        if "trust_remote_code" in str(error):
            raise ValueError(
                "it needs code of its own (auto_map), which runs only where a recipe says so: "
                "read it, then set models.NAME.trust_remote_code: true"
            ) from error
        raise
    return opened


def is_pickle_refused(error: Exception) -> bool:
    """Whether torch has refused to make an object of a ``.bin`` that is no tensor."""
    return type(error).__name__ == "UnpicklingError"


def more_than_tensors(place: Path) -> ConfigError:
    """Return the error of such a file: what is in it could run code, so it is never made."""
    return ConfigError(
        f"{place}: its .bin weights are damaged or hold objects that are no tensors, which could "
        f"run code and are never loaded: save the tensors alone, as safetensors"
    )


def built_from(kind: Any, config: Any) -> Any:
    """Return what ``kind.from_config`` makes of a configuration: random weights, libraries' code.

    Raises ValueError for a configuration whose class is code of its folder's own.
    """
    return kind.from_config(config, trust_remote_code=False)


def _require_own(kind: Any, folder: Path, opened: Any) -> None:
    """Raise ValueError where transformers took the class of another folder for this one's.

    It remembers a model's class by that of its configuration, whose module it names by the folder's
    last name and the content of that file alone. A module's name has a hash of its content.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = _auto_map(folder, _CONFIG).get(kind.__name__)
    if not isinstance(name, str):
        return
    own = get_class_from_dynamic_module(name, folder, local_files_only=True)
    if type(opened).__module__ != own.__module__:
        raise ValueError(
            f"this process has run other code of a folder that is called {folder.name!r} too: give "
            f"one of them another name, or start again"
        )


def _modules(folder: Path, name: str) -> Iterator[str]:
    """Yield each file that a config's ``auto_map`` names, once; ``owner/name--file`` on the hub."""
    named = _auto_map(folder, name).values()
    flat = [one for value in named for one in (value if isinstance(value, list) else [value])]
    yield from dict.fromkeys(f"{one.rpartition('.')[0]}.py" for one in flat if isinstance(one, str))


def _auto_map(folder: Path, name: str) -> dict[str, Any]:
    try:
        body = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # whoever needs the file says what is wrong with it
    auto_map = body.get("auto_map") if isinstance(body, dict) else None
    return auto_map if isinstance(auto_map, dict) else {"": auto_map}  # as old tokenizers wrote it
