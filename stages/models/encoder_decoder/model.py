"""An encoder-decoder in torch, taken apart at its head.

Rows are padded on the right. An encoder sees all of its text, so its padding is masked, for the
decoder too; the decoder is causal, and what follows a token cannot reach it.

Dimensions: B = rows, E = tokens (or vectors) of the longest encoder's text, A = tokens of the
longest decoder's, D = hidden width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from schemas.errors import ConfigError, first_line
from stages.models.causal_lm.model import MAX_HEAD_ERROR, student_head
from stages.models.checkpoints.own_code import open_pretrained
from stages.models.encoder_decoder.halves import Ids


def open_encoder_decoder(folder: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model of a folder; raises what transformers raises."""
    transformers_logging.disable_progress_bar()
    model = open_pretrained(AutoModelForSeq2SeqLM, folder, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model


def load_encoder_decoder(folder: Path, *, device: torch.device, role: str) -> PreTrainedModel:
    """Load a model in float32; raises ConfigError if its head cannot be taken apart.

    ``role`` is what an error calls it.
    """
    try:
        model = open_encoder_decoder(folder, dtype=torch.float32).to(device).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the {role} {folder}: {first_line(error)}") from error
    with torch.no_grad():
        head = student_head(model)
        ids_BT = torch.arange(16, device=device)[None] % len(head.weight_VD)
        expected_TV = model(input_ids=ids_BT, decoder_input_ids=ids_BT).logits[0]
        mask_BT = torch.ones_like(ids_BT)
        encoded_BTD = encoder_states(model, model.get_input_embeddings()(ids_BT), mask_BT)
        hidden_BTD = decoder_states(model, encoded_BTD, mask_BT, ids_BT)
        off_TV = (head.logits(hidden_BTD[0]) - expected_TV).abs()
        error_of_largest = float(off_TV.max() / (1 + expected_TV.abs().max()))
    if not error_of_largest <= MAX_HEAD_ERROR:
        raise ConfigError(
            f"{role} {folder}: its logits are not head(last hidden state) but off by "
            f"{error_of_largest:.2g} of the largest: {type(model).__name__} does something this "
            f"trainer does not know"
        )
    return model


def padded(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Return ids [B, E], padded with 0, and their mask [B, E] of 0 and 1."""
    lengths_B = torch.tensor([len(ids) for ids in rows])
    ids_BE = pad_sequence([torch.from_numpy(ids) for ids in rows], batch_first=True)
    return ids_BE, mask_of(lengths_B, ids_BE.shape[1])


def mask_of(lengths_B: Tensor, width: int) -> Tensor:
    """Return [B, width] with 1 at the first tokens of each row, on the device of the lengths."""
    places_E = torch.arange(width, device=lengths_B.device)
    return (places_E < lengths_B[:, None]).long()


def encoder_states(model: Any, embedded_BED: Tensor, mask_BE: Tensor) -> Tensor:
    """Return [B, E, D] of an encoder's text, which is given as embeddings."""
    states_BED: Tensor = model.get_encoder()(
        inputs_embeds=embedded_BED, attention_mask=mask_BE
    ).last_hidden_state
    return states_BED


def decoder_states(
    model: Any, encoded_BED: Tensor, mask_BE: Tensor, decoder_ids_BA: Tensor
) -> Tensor:
    """Return [B, A, D], what the head reads behind each token of the decoder's text."""
    states_BAD: Tensor = model.get_decoder()(
        input_ids=decoder_ids_BA,
        encoder_hidden_states=encoded_BED,
        encoder_attention_mask=mask_BE,
        use_cache=False,
    ).last_hidden_state
    return states_BAD
