"""The frozen reader: a causal LM that is fed vectors in the place of demonstrations.

Its weights have no gradient, but what it computes has one: that of the vectors. Positions begin
with the vectors, at 0.

Dimensions: B = rows, M = vectors of a row, Q = tokens of a query with its answer, N = scored
positions of a batch, R = hidden width.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.errors import ConfigError
from stages.models.causal_lm.language_head import max_positions
from stages.models.causal_lm.model import last_hidden_states, last_layer_of, load_student
from stages.models.checkpoints.checkpoint import run_fingerprint, weight_checksums
from stages.models.checkpoints.tokenizer_identity import tokenizer_fingerprint
from stages.student.distiller.distiller import Distiller


def reader_fingerprint(folder: Path) -> str:
    """Return what names a reader by content: its weights and its tokenizer."""
    tokenizer = tokenizer_fingerprint(folder)
    return run_fingerprint({"weights": weight_checksums(folder), "tokenizer": tokenizer})


def load_reader(folder: Path, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a reader, frozen and in evaluation mode; raises ConfigError as for a student."""
    reader = load_student(folder, device=device, role="reader")
    reader.requires_grad_(requires_grad=False)
    reader.to(dtype)
    return reader.eval()


def check_reader(distiller: Distiller, reader: PreTrainedModel, folder: Path) -> None:
    """Raise ConfigError unless the distiller's vectors are made for this reader."""
    found, expected = reader_fingerprint(folder), distiller.config.reader
    if found != expected:
        raise ConfigError(
            f"reader {folder} is {found[:12]}, the distiller was made for reader {expected[:12]}: "
            f"name that one, or begin with a step of stage distiller_init for this one"
        )
    width = reader.get_input_embeddings().weight.shape[1]
    if width != distiller.config.reader_hidden_size:
        raise ConfigError(
            f"reader {folder} reads embeddings of width {width}, the distiller's vectors have "
            f"{distiller.config.reader_hidden_size}: use a reader whose embeddings are as wide as "
            f"its hidden states"
        )


def window_of(reader: PreTrainedModel) -> int | None:
    """Return how many vectors and tokens a reader can read together, None where it says none."""
    return max_positions(reader.config.get_text_config())


def read_hidden_states(
    reader: PreTrainedModel, vectors_BMR: Tensor, input_ids_BQ: Tensor
) -> Tensor:
    """Return [B, Q, R] what the head reads at the tokens of queries that follow the vectors."""
    embedded_BQR = reader.get_input_embeddings()(input_ids_BQ)
    inputs_BTR = torch.cat([vectors_BMR.to(embedded_BQR.dtype), embedded_BQR], dim=1)
    hidden_BTR = last_hidden_states(
        reader, last_layer=last_layer_of(reader), inputs_embeds=inputs_BTR
    )
    return hidden_BTR[:, vectors_BMR.shape[1] :]


def read_scored_states(
    distiller: nn.Module, reader: PreTrainedModel, batch: Mapping[str, Tensor]
) -> Tensor:
    """Return [N, R] at the scored positions of a batch of queries, after the distiller's vectors.

    ``distiller`` may be wrapped (DDP has to see the call).
    """
    vectors_BMR = distiller(batch["demonstration_ids_BL"], batch["demonstration_lengths_B"])
    hidden_BQR = read_hidden_states(reader, vectors_BMR, batch["input_ids"])
    return hidden_BQR.flatten(0, 1).index_select(0, batch["positions_N"])
