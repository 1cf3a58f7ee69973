"""The student as the trainer sees it: a transformers model, taken apart at its head.

Dimensions: B = rows, T = tokens, N = scored positions, V = vocabulary, D = hidden width.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from schemas.dataset import CachedDataset
from schemas.errors import ConfigError, IdentityMismatch, first_line
from schemas.storage.manifest import MANIFEST
from stages.models.causal_lm.chunked_loss import StudentHead
from stages.models.causal_lm.language_head import head_features
from stages.models.checkpoints.checkpoint import require_whole
from stages.models.checkpoints.own_code import open_pretrained
from stages.models.checkpoints.rotary_scaling import ONE_SET, fixed_window
from stages.models.checkpoints.tokenizer_identity import (
    num_token_ids,
    tokenizer_fingerprint,
    vocabulary_fingerprint,
)

MAX_HEAD_ERROR = 1e-3  # of logits in float32, relative to 1 + the largest


def load_student(folder: Path, *, device: torch.device, role: str = "student") -> PreTrainedModel:
    """Load a student in float32; raises ConfigError if its head cannot be taken apart.

    Raises StoreError for a step's model whose files have changed since. A forward of it raises
    ConfigError for a row that would move its rotary factors, and with them the numbers of every
    row beside it. ``role`` is what an error calls it.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist: give the folder of a {role}")
    require_whole(folder)
    transformers_logging.disable_progress_bar()
    try:
        model = open_pretrained(AutoModelForCausalLM, folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the {role} {folder}: {first_line(error)}") from error
    assert isinstance(model, PreTrainedModel)
    model.to(device)
    _check_head(model, f"{role} {folder}")
    _hold_to_window(model, f"{role} {folder}")
    return model


def choose_attention(model: PreTrainedModel, implementation: str, name: str) -> None:
    """Have a loaded model's attention computed so; raises ConfigError where it cannot be."""
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"attn_implementation: {name} ({type(model).__name__}) takes no {implementation}: "
            f"{first_line(error)}"
        ) from error


def check_student(folder: Path, dataset: CachedDataset, vocab_size: int) -> None:
    """Raise IdentityMismatch unless the data's token ids are this student's.

    Ids decide and not the number of rows: it needs a row for every id that a token uses, and none
    for the padding of another model's matrix.
    """
    require_vocabulary(
        "student", folder, dataset, "start from a student with the teacher's tokenizer"
    )
    if vocab_size < (needed := rows_needed(folder, dataset)):
        raise IdentityMismatch(
            f"student {folder} has a vocabulary of {vocab_size}, the data's ids need {needed}: "
            f"use a student with at least as many embedding rows"
        )


def require_vocabulary(role: str, folder: Path, dataset: CachedDataset, advice: str) -> None:
    """Raise IdentityMismatch unless a model's tokenizer has the data's ids; names both.

    A table of before 0.2.0 names its tokenizer alone, chat template and special tokens with it.
    """
    found, vocabulary = tokenizer_fingerprint(folder), vocabulary_fingerprint(folder)
    if any(manifest.has_ids_of(found, vocabulary) for manifest in dataset.manifests):
        return
    manifest, place = dataset.manifests[0], dataset.folders[0]
    if not manifest.vocabulary:
        advice += (
            f"; where they differ in chat template and special tokens alone, delete {MANIFEST} "
            f"there and run the recipe again: what is finished is kept"
        )
    raise IdentityMismatch(
        f"{role} {folder} has tokenizer {found[:12]}, {place} was made with "
        f"{manifest.tokenizer[:12]}: {advice}"
    )


def rows_needed(folder: Path, dataset: CachedDataset) -> int:
    """Return how many rows a model of the data's tokenizer, in ``folder``, has to have."""
    largest = max(manifest.vocab_size for manifest in dataset.manifests)
    return min(largest, num_token_ids(folder) or largest)


def student_vocab_size(model: PreTrainedModel) -> int:
    """Return the number of logits the model gives."""
    return len(student_head(model).weight_VD)


def student_head(model: PreTrainedModel) -> StudentHead:
    """Return the model's own head parameters and what its config does after the product."""
    layer = model.get_output_embeddings()
    assert isinstance(layer, nn.Linear), f"the head is a {type(layer).__name__}"
    scale, softcap = head_features(model.config)
    return StudentHead(layer.weight, layer.bias, scale, softcap)


def final_hidden_states(
    model: nn.Module,
    input_ids_BT: Tensor,
    *,
    last_layer: int,
    position_ids_BT: Tensor | None = None,
) -> Tensor:
    """Return [B, T, D] of token ids; see ``last_hidden_states``.

    Rows that lie end to end are told apart by positions that begin anew with each.
    """
    inputs = {"input_ids": input_ids_BT}
    if position_ids_BT is not None:
        inputs["position_ids"] = position_ids_BT
    return last_hidden_states(model, last_layer=last_layer, **inputs)


def last_hidden_states(model: nn.Module, *, last_layer: int, **inputs: Tensor) -> Tensor:
    """Return [B, T, D] what the head reads, after the last norm; no [B, T, V] is made.

    ``inputs`` are ``input_ids`` [B, T] or ``inputs_embeds`` [B, T, D]. ``model`` may be wrapped
    (DDP has to see the call). Asking for one layer by its index keeps transformers from holding all
    others; the last one is given after the norm.
    """
    output = model(
        **inputs,
        output_hidden_states=[last_layer],
        logits_to_keep=1,
        use_cache=False,
    )
    hidden_BTD = output.hidden_states[-1]
    assert isinstance(hidden_BTD, Tensor)
    return hidden_BTD


def last_layer_of(model: PreTrainedModel) -> int:
    """Return the index of the last decoder layer."""
    return int(model.config.get_text_config().num_hidden_layers) - 1


def scored_hidden_states(model: nn.Module, batch: dict[str, Tensor], *, last_layer: int) -> Tensor:
    """Return [N, D] hidden states of a batch's scored positions."""
    hidden_BTD = final_hidden_states(
        model,
        batch["input_ids"],
        last_layer=last_layer,
        position_ids_BT=batch.get("position_ids"),
    )
    return hidden_BTD.flatten(0, 1).index_select(0, batch["positions_N"])


def _hold_to_window(model: PreTrainedModel, name: str) -> None:
    window = fixed_window(model.config.to_dict())
    if window is None:
        return

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        cache = kwargs.get("past_key_values")
        length = inputs.shape[1] + (0 if cache is None else cache.get_seq_length())
        if (positions_BT := kwargs.get("position_ids")) is not None:
            length = int(positions_BT.max()) + 1
        if length > window:
            raise ConfigError(
                f"{name} is given a row of {length} tokens and takes {window}: {ONE_SET}"
            )

    model.get_decoder().register_forward_pre_hook(check, with_kwargs=True)


def _check_head(model: PreTrainedModel, name: str) -> None:
    """Compare the head applied by us with the model's own logits, once, on a few tokens."""
    forward: Any = model.forward
    if "logits_to_keep" not in inspect.signature(forward).parameters:
        raise ConfigError(
            f"{name}: {type(model).__name__} has no logits_to_keep, so its logits cannot "
            f"be held back; use another architecture"
        )
    training = model.training
    model.eval()
    with torch.no_grad():
        head = student_head(model)
        input_ids_BT = torch.arange(16, device=model.device)[None] % len(head.weight_VD)
        expected_TV = model(input_ids=input_ids_BT, use_cache=False).logits[0].float()
        hidden_BTD = final_hidden_states(model, input_ids_BT, last_layer=last_layer_of(model))
        off_TV = (head.logits(hidden_BTD[0]) - expected_TV).abs()
        error = float(off_TV.max() / (1 + expected_TV.abs().max()))
    model.train(training)
    if not error <= MAX_HEAD_ERROR:
        raise ConfigError(
            f"{name}: its logits are not head(last hidden state) but off by {error:.2g} "
            f"of the largest: {type(model).__name__} does something this trainer does not know"
        )
