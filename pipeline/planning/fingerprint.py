"""Names by content: everything that changes bytes goes into a hash, and nothing else does.

A value without stable bytes (a set, a path object, a float that is not finite, an object's default
repr) raises instead of being hashed by accident.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError
from schemas.storage.files import Folder
from schemas.storage.remembered_sha256 import remembered_sha256
from stages.models.checkpoints.adapters import ADAPTER_CONFIG, adapter_files
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.models.checkpoints.own_code import code_files
from stages.models.checkpoints.rotary_scaling import fixed_window
from stages.models.checkpoints.tokenizer_identity import tokenizer_fingerprint

ADDRESS_DIGITS = 12
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
# What a config file says about its own origin, which moves no weight and no logit.
_CONFIG_NOISE = ("_name_or_path", "transformers_version")
_ADAPTER_NOISE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")


def canonical_json(value: Any) -> str:
    """Return one text for one value; raises TypeError for a value without stable bytes."""
    _check_stable(value, "identity")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """Return the sha256 of a step's whole identity."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def _check_stable(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{path} has the key {key!r}; keys must be text")
            _check_stable(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_stable(item, f"{path}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{path} is {value}: only finite numbers have stable bytes")
    elif value is not None and not isinstance(value, str | int | bool):
        raise TypeError(f"{path} is a {type(value).__name__}, which has no stable bytes")


def model_identity(
    folder: Path,
    *,
    dtype: str,
    engine: str,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return what makes a model answer as it does: weights, config, tokenizer, dtype and engine.

    Weight files are hashed whole, once: the result is remembered by path, size and time. A PEFT
    ``adapter`` adds its own weights and config, ``trust_remote_code`` the folder's Python files.
    """
    config = _model_config(folder)
    weights = sorted(path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern))
    if not weights:
        raise ConfigError(f"{folder} has no weight file (*.safetensors or *.bin)")
    identity: dict[str, Any] = {
        "config": {key: value for key, value in config.items() if key not in _CONFIG_NOISE},
        "weights": {path.name: remembered_sha256(path) for path in weights},
        "tokenizer": tokenizer_fingerprint(folder),
        "dtype": dtype,
        "engine": engine,
    }
    if (window := fixed_window(config)) is not None:
        identity["rotary_window"] = window
    if adapter is not None:
        identity["adapter"] = _adapter_identity(adapter)
    if trust_remote_code:
        identity["code"] = {
            path.relative_to(folder).as_posix(): remembered_sha256(path)
            for path in code_files(folder)
        }
    return identity


def folder_identity(folder: Path) -> dict[str, Any]:
    """Return the identity of a folder that no recipe names: of its step, where one made it.

    Dtype and engine are none that a recipe says: compare by ``is_one_model``.
    """
    record = read_checkpoint(folder)
    if record is not None:
        return {"step": record.fingerprint}
    return model_identity(folder, dtype="", engine="")


def _adapter_identity(adapter: Path) -> dict[str, Any]:
    weights = adapter_files(adapter)
    config = _json_object(adapter / ADAPTER_CONFIG)
    return {
        "config": {key: value for key, value in config.items() if key not in _ADAPTER_NOISE},
        "weights": {path.name: remembered_sha256(path) for path in weights},
        "merged_in": "float32",
    }


def _model_config(folder: Folder) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} is not a model folder: it has no config.json; give the path of a folder "
            f"saved by transformers"
        )
    return _json_object(path)


def _json_object(path: Folder) -> dict[str, Any]:
    try:
        # Infinity, in configs of state-space models, is no finite number: named as it is spelt
        body = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; save the model again") from error
    if not isinstance(body, dict):
        raise ConfigError(f"{path} holds no JSON object; save the model again")
    return body


def vocab_size_of(folder: Folder) -> int:
    """Return how many logits a model gives: its config's vocabulary, the text part's if nested."""
    return _size_in_config(folder, "vocab_size")


def hidden_size_of(folder: Folder) -> int:
    """Return the width of a model's final hidden state."""
    return _size_in_config(folder, "hidden_size", "n_embd", "d_model")


def _size_in_config(folder: Folder, *names: str) -> int:
    config = _model_config(folder)
    for holder in (config, config.get("text_config") or {}):
        for name in names:
            if isinstance(holder.get(name), int):
                return int(holder[name])
    raise ConfigError(f"{folder}/config.json gives no {names[0]}: expected a language model")
