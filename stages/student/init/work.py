"""The work of ``student_init``: a teacher's tokenizer, embeddings, head and some of its layers.

Initialising from the teacher's own layers is what DistilBERT (arXiv 1910.01108, section 3) and
"shrink and fine-tune" (arXiv 2010.13002) do. We keep layers at even distances *including both
ends*: the first reads the embeddings and the last feeds the head, which the student shares.

Works for any decoder whose layers lie in one ``ModuleList`` (llama, qwen2, gemma3, gpt2, ...).
Per-layer lists of its config (``layer_types`` and the like) are cut to the kept layers. As a config
may hold per-layer facts in other forms too, the saved student is loaded again and has to give the
very logits of the kept layers in place.

Cost: the whole teacher once in CPU memory, at its own dtype. SmolLM2-135M takes 3 s (2026-11).
"""

import filecmp
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from schemas.errors import ConfigError, StoreError, first_line
from stages.models.checkpoints.checkpoint import (
    CheckpointRecord,
    equal_modes,
    require_whole,
    write_checkpoint,
)
from stages.models.checkpoints.own_code import open_pretrained
from stages.models.checkpoints.tokenizer_identity import copy_tokenizer, tokenizer_fingerprint
from stages.stage import StepJob
from stages.student.init.stage import StudentInitStage, chosen_layers
from stages.student.init.vocabulary import take_vocabulary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONFIG = "config.json"  # moved into place last: without it a folder is no model
_PROBE_TOKENS = 8
_NOT_PER_LAYER = ("architectures", "keys_to_ignore_at_inference")


@dataclass(frozen=True, slots=True)
class StudentInfo:
    """What was made: where, of which of the teacher's layers, and how large."""

    path: Path
    layers: tuple[int, ...]
    teacher_layers: int
    num_parameters: int
    dtype: str


def make(stage: StudentInitStage, job: StepJob) -> None:
    """Make the student of a step."""
    tokenizer = None if stage.tokenizer is None else Path(stage.tokenizer)
    init_student(job.models[stage.model].path, job.output, stage.layers, tokenizer=tokenizer)
    record = CheckpointRecord(fingerprint=job.fingerprint, identity=job.identity)
    write_checkpoint(job.output, record)


def init_student(
    teacher: Path,
    output: Path,
    layers: int | Sequence[int],
    *,
    dtype: str | None = None,
    tokenizer: Path | None = None,
) -> StudentInfo:
    """Save a student of ``teacher`` in ``output`` as an ordinary transformers folder.

    ``layers`` is how many to keep, evenly spaced, or which ones, in order. ``dtype`` is that of
    the saved weights, by default the teacher's. ``tokenizer`` is the folder of one that the student
    is to have in the place of the teacher's. Equal arguments give equal bytes, and making the same
    student again changes nothing; raises ConfigError where another model lies in ``output``.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: got '{dtype}', expected one of {', '.join(DTYPES)}")
    tokenizer_fingerprint(teacher)  # raises ConfigError where there is no tokenizer
    model = _load(teacher, DTYPES[dtype] if dtype else "auto")
    holder, name = _layer_list(model, teacher)
    num_layers = len(getattr(holder, name))
    kept = chosen_layers(layers, num_layers)
    _keep_layers(model, holder, name, kept)
    if tokenizer is not None:
        take_vocabulary(model, teacher, tokenizer)
    with _new_folder(output) as folder:
        model.save_pretrained(folder)
        copy_tokenizer(tokenizer or teacher, folder)
        _require_same_logits(model, folder, teacher)
    return StudentInfo(
        path=output,
        layers=kept,
        teacher_layers=num_layers,
        num_parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _load(folder: Path, dtype: Any) -> Any:
    if not (folder / _CONFIG).is_file():
        raise ConfigError(f"teacher: {folder} is not a model folder (it has no {_CONFIG})")
    require_whole(folder)
    transformers_logging.disable_progress_bar()
    try:
        model = open_pretrained(AutoModelForCausalLM, folder, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"teacher: {folder} cannot be loaded: {first_line(error)}") from error
    return model.eval()


def _layer_list(model: Any, teacher: Path) -> tuple[torch.nn.Module, str]:
    """Return the module that holds the decoder's layers, and their name in it."""
    decoder = model.get_decoder()
    num_layers = model.config.get_text_config().num_hidden_layers
    names = [
        name
        for name, child in decoder.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == num_layers
    ]
    if len(names) != 1:
        raise ConfigError(
            f"teacher: {teacher} ({type(model).__name__}) does not keep its {num_layers} layers "
            f"in one list, so no student can be cut out of it"
        )
    return decoder, names[0]


def _keep_layers(model: Any, holder: torch.nn.Module, name: str, kept: tuple[int, ...]) -> None:
    layers: Any = getattr(holder, name)
    setattr(holder, name, torch.nn.ModuleList([layers[index] for index in kept]))
    for new_index, layer in enumerate(getattr(holder, name)):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = new_index
    config = model.config.get_text_config()
    per_layer = {
        key: [value[index] for index in kept]
        for key, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == len(layers) and _is_per_layer(key)
    }
    config.num_hidden_layers = len(kept)
    for key, value in per_layer.items():
        setattr(config, key, value)


def _is_per_layer(key: str) -> bool:
    """Tell a list with an entry a layer from one that happens to be as long (eos_token_id)."""
    return key not in _NOT_PER_LAYER and not key.endswith(("_token_id", "_token_ids"))


@torch.inference_mode()
def _require_same_logits(model: Any, folder: Path, teacher: Path) -> None:
    """Raise ConfigError unless the saved student, loaded again, is the model in memory."""
    saved = _load(folder, model.dtype)
    vocab_size = model.config.get_text_config().vocab_size
    input_ids = torch.arange(_PROBE_TOKENS)[None] * 7919 % vocab_size
    expected, found = (m(input_ids, use_cache=False).logits for m in (model, saved))
    if not torch.allclose(expected, found, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"teacher: {teacher} ({type(model).__name__}) does not survive losing layers: saved "
            f"and loaded again, the student's logits are off by "
            f"{(expected - found).abs().max().item():.3g}; its config must hold facts on layers "
            f"that are not known here"
        )


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """Give an empty folder; on success its files move to ``output``, ``config.json`` last."""
    output.mkdir(parents=True, exist_ok=True)
    for leftover in output.glob(".partial-*"):
        shutil.rmtree(leftover)
    folder = output / f".partial-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    try:
        yield folder
        _move_into(output, folder)
    except OSError as error:
        raise StoreError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_into(output: Path, folder: Path) -> None:
    names = [*sorted(path.name for path in folder.iterdir() if path.name != _CONFIG), _CONFIG]
    if (output / _CONFIG).is_file():
        differing = [name for name in names if not _same(folder / name, output / name)]
        if differing:
            raise ConfigError(
                f"{output} already holds another model ({differing[0]} differs): choose another "
                f"folder, or remove it"
            )
        return
    equal_modes(folder)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    for name in names:
        os.replace(folder / name, output / name)


def _same(ours: Path, theirs: Path) -> bool:
    if ours.is_dir():
        return theirs.is_dir() and not filecmp.dircmp(ours, theirs).diff_files
    return theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False)
