"""A PEFT adapter on a base model, merged once into an ordinary folder that every engine takes.

vLLM can also serve a plain LoRA adapter beside its base, out of one engine: ``served_rank``.

The folder lies in the user's cache under a name by content, so equal pairs of base and adapter are
merged once on a machine, whoever asks; two that ask at once both merge, and the first to finish
wins. Weights are merged in float32, whatever the base is stored in, and saved in the dtype in
which the recipe runs the model: they are rounded once, and not at all for float32.

Cost: the base once in CPU memory, in float32, and once more on disk.
"""

import json
import os
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError, StoreError, first_line
from schemas.storage.files import Folder
from schemas.storage.shard_cache import user_cache
from stages.models.checkpoints.checkpoint import (
    CHECKPOINT,
    equal_modes,
    read_record,
    require_whole,
    run_fingerprint,
    weight_checksums,
)
from stages.models.checkpoints.own_code import open_pretrained
from stages.models.checkpoints.tokenizer_identity import copy_tokenizer

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_OUTSIDE_LAYERS = ("lm_head", "embed", "wte", "all-linear")
_NOT_SERVED = (
    "modules_to_save",
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
    "trainable_token_indices",
)
# Ways to begin that leave the base alone; any other moves its weights when PEFT loads the adapter.
_PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM 0.32 takes as max_lora_rank


def adapter_files(adapter: Path) -> list[Path]:
    """Return an adapter's weight files; raises ConfigError for a folder that is none."""
    found = [adapter / name for name in ADAPTER_WEIGHTS if (adapter / name).is_file()]
    if not found or not (adapter / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{adapter} is not a PEFT adapter: expected {ADAPTER_CONFIG} and "
            f"{' or '.join(ADAPTER_WEIGHTS)}, as save_pretrained writes them"
        )
    return found


def served_rank(adapter: Path) -> int | None:
    """Return the rank that vLLM has to make room for; None where the adapter must be merged.

    It serves low-rank updates of the layers' own matrices, and neither weights saved whole, nor
    DoRA and other kinds, nor changes to embeddings or head (which we hold ourselves).
    """
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    targets = config.get("target_modules") or []
    beginning = config.get("init_lora_weights", True)
    named = [targets] if isinstance(targets, str) else targets
    plain = (
        config.get("peft_type") == "LORA"
        and not any(config.get(name) for name in _NOT_SERVED)
        and (not isinstance(beginning, str) or beginning.lower() in _PLAIN_BEGINNINGS)
        and config.get("bias", "none") == "none"
        and not any(name in target for target in named for name in _OUTSIDE_LAYERS)
    )
    ranks = [int(config.get("r") or 0), *(config.get("rank_pattern") or {}).values()]
    fitting = [rank for rank in _SERVED_RANKS if rank >= max(ranks)]
    return fitting[0] if plain and fitting else None


def merged_folder(base: Path, adapter: Path, *, dtype: str, name: str) -> Path:
    """Return the folder of ``base`` with ``adapter`` merged in, made now if it is not there.

    ``name`` is a hash of what both hold and of ``dtype``, that of the weights saved. Raises
    ConfigError where PEFT is not installed or the adapter does not fit the base.
    """
    target = user_cache() / "merged" / name
    if (target / "config.json").is_file():
        return target
    scratch = target.with_name(f".{name}-{uuid.uuid4().hex[:12]}")
    try:
        scratch.mkdir(parents=True)
        _merge(base, adapter, scratch, dtype)
        copy_tokenizer(base, scratch)
        equal_modes(scratch)
        os.rename(scratch, target)
    except OSError as error:
        if not (target / "config.json").is_file():  # else another process was first
            raise StoreError(f"cannot write the merged model {target}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def trained_name(adapter: Folder, dtype: str) -> str:
    """Return the name of what a training step's adapter is merged into, by what both hold."""
    record = read_record(adapter)
    files = {name: record.files[name] for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS[0])}
    return run_fingerprint({"base": record.identity["student"], **files, "dtype": dtype})[:32]


def whole_model(folder: Path) -> Path:
    """Return ``folder``, or where it is a training step's adapter, that merged into its base.

    Raises ConfigError where the base is no longer what the adapter was trained on.
    """
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / CHECKPOINT).is_file():
        return folder
    require_whole(folder)
    named = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = Path(named["base_model_name_or_path"] or "")
    if not base.is_dir() or weight_checksums(base) != read_record(folder).identity["student"]:
        raise ConfigError(
            f"{folder} is an adapter on {base}, which is not there or holds other weights by now: "
            f"use it as a step of its recipe, or put the model there again"
        )
    name = trained_name(folder, "float32")
    return merged_folder(base, folder, dtype="float32", name=name)


def _merge(base: Path, adapter: Path, output: Path, dtype: str) -> None:
    import torch

    model = _loaded(base)
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    adapted = adapted_model(model, adapter, base)
    try:
        with torch.no_grad():
            merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # safe_merge found a number that is none
        raise ConfigError(
            f"the adapter {adapter} cannot be merged into {base}: {first_line(error)}; train or "
            f"save it again"
        ) from error
    after = {name: tuple(tensor.shape) for name, tensor in merged.state_dict().items()}
    if after != before:
        raise ConfigError(
            f"the adapter {adapter} changes which weights {base} has, so it cannot be merged: save "
            f"the adapted model as a full one"
        )
    merged.to(getattr(torch, dtype)).save_pretrained(output)


def _loaded(base: Path) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        return open_pretrained(AutoModelForCausalLM, base, dtype="float32")
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"cannot load the model {base} to merge an adapter into it: {first_line(error)}"
        ) from error


def adapted_model(model: Any, adapter: Path, base: Path) -> Any:
    """Return a loaded ``model`` with the adapter on it; raises what ``merged_folder`` raises."""
    try:
        from peft import PeftModel  # an extra
        from safetensors import SafetensorError
    except ImportError as error:
        raise ConfigError(
            f"the adapter {adapter} needs PEFT ({error}): install teachercache[align]"
        ) from error
    try:
        # PEFT only warns of weights that it finds no place for.
        with warnings.catch_warnings(action="error", category=UserWarning):
            return PeftModel.from_pretrained(model, str(adapter))
    except (ValueError, RuntimeError, KeyError, UserWarning, SafetensorError) as error:
        raise ConfigError(
            f"the adapter {adapter} does not fit the model {base}: {first_line(error)}; use it "
            f"whole and with the model that it was trained on"
        ) from error
