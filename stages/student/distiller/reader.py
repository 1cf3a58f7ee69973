"""The frozen reader: a causal LM, or a T5, that is fed vectors in the place of demonstrations.

Its weights have no gradient, but what it computes has one: that of the vectors. Positions begin
with the vectors, at 0. The encoder of a T5 reads vectors, query and the end of the text, and its
decoder says the answer (``stages.models.encoder_decoder.halves``).

Dimensions: B = rows, M = vectors of a row, Q = tokens of a query with its answer, E = tokens of an
encoder's text, A = tokens that a decoder reads or of an answer, N = scored positions of a batch (or
answers to one query), R = hidden width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.errors import ConfigError
from stages.models.causal_lm.language_head import max_positions, read_config
from stages.models.causal_lm.model import last_hidden_states, last_layer_of, load_student
from stages.models.checkpoints.checkpoint import (
    require_whole,
    run_fingerprint,
    weight_checksums,
)
from stages.models.checkpoints.tokenizer_identity import tokenizer_fingerprint
from stages.models.encoder_decoder.halves import frame_of
from stages.models.encoder_decoder.model import (
    decoder_states,
    encoder_states,
    load_encoder_decoder,
    mask_of,
)
from stages.student.distiller.distiller import Distiller


def reader_fingerprint(folder: Path) -> str:
    """Return what names a reader by content: its weights and its tokenizer."""
    tokenizer = tokenizer_fingerprint(folder)
    return run_fingerprint({"weights": weight_checksums(folder), "tokenizer": tokenizer})


def load_reader(folder: Path, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a reader, frozen and in evaluation mode; raises ConfigError as for a student."""
    require_whole(folder)
    is_causal = frame_of(read_config(folder), folder) is None
    load = load_student if is_causal else load_encoder_decoder
    reader = load(folder, device=device, role="reader")
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
    if "encoder_ids_BE" in batch:
        text = batch["encoder_ids_BE"], batch["encoder_lengths_B"]
        encoded_BTR, mask_BT = _encoded(reader, vectors_BMR, *text)
        hidden_BQR = decoder_states(reader, encoded_BTR, mask_BT, batch["input_ids"])
    else:
        hidden_BQR = read_hidden_states(reader, vectors_BMR, batch["input_ids"])
    return hidden_BQR.flatten(0, 1).index_select(0, batch["positions_N"])


def answer_states(
    reader: PreTrainedModel, vectors_MR: Tensor, query_ids: Sequence[int], answers_NA: Tensor
) -> Tensor:
    """Return [N, A, R], what the head reads before each token of answers to one query.

    They follow the vectors and the query; ``answers_NA`` is padded on the right.
    """
    frame, device = frame_of(reader.config), vectors_MR.device
    if frame is None:
        query_Q = torch.tensor(query_ids, device=device)
        ids_NQ = torch.cat([query_Q.expand(len(answers_NA), -1), answers_NA], dim=1)
        vectors_NMR = vectors_MR.expand(len(answers_NA), -1, -1)
        return read_hidden_states(reader, vectors_NMR, ids_NQ)[:, len(query_ids) - 1 : -1]
    text_E = torch.from_numpy(frame.encoder_ids(np.array(query_ids, np.int64))).to(device)
    length_1 = torch.tensor([len(text_E)], device=device)
    encoded_1TR, mask_1T = _encoded(reader, vectors_MR[None], text_E[None], length_1)
    start_N1 = torch.full_like(answers_NA[:, :1], frame.start_id)
    return decoder_states(
        reader,
        encoded_1TR.expand(len(answers_NA), -1, -1),
        mask_1T.expand(len(answers_NA), -1),
        torch.cat([start_N1, answers_NA[:, :-1]], dim=1),
    )


def _encoded(
    reader: PreTrainedModel, vectors_BMR: Tensor, text_ids_BE: Tensor, lengths_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return [B, M + E, R] of an encoder that reads vectors and texts, and their mask."""
    embedded_BER = reader.get_input_embeddings()(text_ids_BE)
    inputs_BTR = torch.cat([vectors_BMR.to(embedded_BER.dtype), embedded_BER], dim=1)
    mask_BT = mask_of(lengths_B + vectors_BMR.shape[1], inputs_BTR.shape[1])
    return encoder_states(reader, inputs_BTR, mask_BT), mask_BT
