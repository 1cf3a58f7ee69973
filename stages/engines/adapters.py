"""A PEFT adapter on a base model, merged once into an ordinary folder that every engine takes.

The folder lies in the user's cache under a name by content, so equal pairs of base and adapter are
merged once on a machine, whoever asks; two that ask at once both merge, and the first to finish
wins. Weights are merged in the dtype in which the base is stored.

Cost: the base once in CPU memory, and once more on disk.
"""

import os
import shutil
import uuid
import warnings
from pathlib import Path

from schemas.errors import ConfigError, StoreError
from stages.tokenizer_identity import copy_tokenizer
from stages.user_cache import user_cache

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def adapter_files(adapter: Path) -> list[Path]:
    """Return an adapter's weight files; raises ConfigError for a folder that is none."""
    found = [adapter / name for name in ADAPTER_WEIGHTS if (adapter / name).is_file()]
    if not found or not (adapter / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{adapter} is not a PEFT adapter: expected {ADAPTER_CONFIG} and "
            f"{' or '.join(ADAPTER_WEIGHTS)}, as save_pretrained writes them"
        )
    return found


def merged_folder(base: Path, adapter: Path, *, name: str) -> Path:
    """Return the folder of ``base`` with ``adapter`` merged in, made now if it is not there.

    ``name`` is a hash of what both hold. Raises ConfigError where PEFT is not installed or the
    adapter does not fit the base.
    """
    target = user_cache() / "merged" / name
    if (target / "config.json").is_file():
        return target
    scratch = target.with_name(f".{name}-{uuid.uuid4().hex[:12]}")
    try:
        scratch.mkdir(parents=True)
        _merge(base, adapter, scratch)
        copy_tokenizer(base, scratch)
        os.rename(scratch, target)
    except OSError as error:
        if not (target / "config.json").is_file():  # else another process was first
            raise StoreError(f"cannot write the merged model {target}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _merge(base: Path, adapter: Path, output: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    try:
        from peft import PeftModel  # an extra
    except ImportError as error:
        raise ConfigError(
            f"the adapter {adapter} needs PEFT ({error}): install teachercache[align]"
        ) from error
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        with torch.no_grad(), warnings.catch_warnings(action="error", category=UserWarning):
            adapted = PeftModel.from_pretrained(model, str(adapter))
            merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, UserWarning) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the adapter {adapter} does not fit the model {base}: {reason}; use it with the model "
            f"that it was trained on"
        ) from error
    after = {name: tuple(tensor.shape) for name, tensor in merged.state_dict().items()}
    if after != before:
        raise ConfigError(
            f"the adapter {adapter} changes which weights {base} has, so it cannot be merged: save "
            f"the adapted model as a full one"
        )
    merged.save_pretrained(output)
