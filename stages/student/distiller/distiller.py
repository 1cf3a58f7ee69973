"""The distiller: a small language model that reads demonstrations and makes vectors of them.

MEND (arXiv 2403.06914): learned prompt embeddings stand after the demonstrations, so that causal
attention lets each of them see all; the last ``num_vectors`` hidden states, after the last norm,
are the vectors. Where the reader is wider or narrower they go through a linear layer and a tanh.
With ``lora_rank`` the small model is held fixed and updated by LoRA; all else is trained in full.

Of an encoder-decoder (T5) the encoder is the small model; it sees in both directions.

A row is padded on the right, after its prompt embeddings. A causal model needs no attention mask,
as nothing that counts can see the padding; an encoder is given one.

Dimensions: B = rows, L = tokens of demonstrations, M = vectors of a row, D = the distiller's hidden
width, R = the reader's.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from schemas.errors import ConfigError, first_line
from stages.models.causal_lm.language_head import max_positions, read_config
from stages.models.checkpoints.checkpoint import require_whole
from stages.models.checkpoints.own_code import built_from, open_pretrained
from stages.models.checkpoints.tokenizer_identity import num_token_ids
from stages.models.encoder_decoder.model import mask_of
from stages.student.lora import add_lora, train_lora_alone

MODEL_TYPE = "demonstration_distiller"
FIRST_PLAIN_ID = 100  # the published code draws prompt embeddings from the rows after these


class DistillerConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped
    """``text_config`` is the small model's; ``reader`` names the reader by content.

    ``lora_rank`` 0 is a small model that is trained in full.
    """

    model_type = MODEL_TYPE
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # transformers' own declaration

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    num_vectors: int = 100
    reader_hidden_size: int = 0
    reader: str = ""
    lora_rank: int = 0
    lora_alpha: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn the stored settings of the small model into a configuration."""
        if isinstance(self.text_config, dict):
            settings = dict(self.text_config)
            self.text_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds: nothing of LoRA where there is none."""
        body: dict[str, Any] = super().to_dict()
        if not self.lora_rank:
            del body["lora_rank"], body["lora_alpha"]
        return body


class Distiller(PreTrainedModel):  # type: ignore[misc]  # transformers is untyped
    """An ordinary transformers model: ``save_pretrained`` and ``from_pretrained`` a folder."""

    config_class = DistillerConfig
    base_model_prefix = ""
    main_input_name = "input_ids_BL"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DistillerConfig) -> None:
        """Build it with random weights; ``distiller_of`` starts from a model's."""
        super().__init__(config)
        assert isinstance(config.text_config, PreTrainedConfig)
        self.body: Any = _random_body(config.text_config)
        self.adapt_body()
        width = self.body.get_input_embeddings().weight.shape[1]
        self.prompt_embeddings_MD = nn.Parameter(torch.zeros(config.num_vectors, width))
        self.projection: nn.Linear | None = None
        if width != config.reader_hidden_size:
            self.projection = nn.Linear(width, config.reader_hidden_size)
        self.post_init()

    def adapt_body(self) -> None:
        """Put LoRA on the small model where the configuration asks for it."""
        if self.config.lora_rank:
            add_lora(self.body, rank=self.config.lora_rank, alpha=self.config.lora_alpha)

    def hold_body(self) -> None:
        """Leave the small model's own weights without a gradient where there is LoRA on it."""
        if self.config.lora_rank:
            train_lora_alone(self.body)

    @property
    def window(self) -> int | None:
        """Tokens of demonstrations that it can read before its prompt embeddings, if bounded."""
        positions = max_positions(self.config.text_config)
        return None if positions is None else positions - self.config.num_vectors

    @property
    def vocab_size(self) -> int:
        """Number of tokens that it has an embedding of."""
        return len(self.get_input_embeddings().weight)

    def get_input_embeddings(self) -> Any:
        """Return the small model's."""
        return self.body.get_input_embeddings()

    def forward(self, input_ids_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the vectors [B, M, R] of demonstrations that are padded on the right."""
        count = self.config.num_vectors
        embedded_BLD = self.get_input_embeddings()(input_ids_BL)
        lengths = lengths_B.tolist()
        prompt_MD = self.prompt_embeddings_MD.to(embedded_BLD.dtype)
        rows = [
            torch.cat([row_LD[:length], prompt_MD])
            for row_LD, length in zip(embedded_BLD, lengths, strict=True)
        ]
        inputs_BTD = pad_sequence(rows, batch_first=True)
        mask_BT = None
        if self.config.text_config.is_encoder_decoder:
            mask_BT = mask_of(lengths_B.to(inputs_BTD.device) + count, inputs_BTD.shape[1])
        hidden_BTD = self.body(
            inputs_embeds=inputs_BTD, attention_mask=mask_BT, use_cache=False
        ).last_hidden_state
        ends = [hidden_TD[n : n + count] for hidden_TD, n in zip(hidden_BTD, lengths, strict=True)]
        vectors_BMD = torch.stack(ends)
        if self.projection is None:
            return vectors_BMD
        return torch.tanh(self.projection(vectors_BMD))


def distiller_of(
    model: Path,
    *,
    num_vectors: int,
    reader_hidden_size: int,
    reader: str,
    seed: int,
    lora_rank: int = 0,
    lora_alpha: float = 0.0,
) -> Distiller:
    """Make a distiller of a small causal LM's folder, or of a T5's encoder, in float32.

    Prompt embeddings begin as rows of its vocabulary, drawn by ``seed`` without repetition. Raises
    ConfigError where the vocabulary has not so many rows, the folder is no model, or ``lora_rank``
    is asked for without PEFT.
    """
    text_config = read_config(model).get_text_config()
    try:
        config = DistillerConfig(
            text_config=text_config.to_dict() | {"_name_or_path": ""},
            num_vectors=num_vectors,
            reader_hidden_size=reader_hidden_size,
            reader=reader,
        )
        with torch.random.fork_rng(devices=[]):  # weights of projection and LoRA are torch's own
            torch.manual_seed(seed)
            distiller = Distiller(config)
            distiller.body = _body(model, _kind_of(text_config))
            config.lora_rank, config.lora_alpha = lora_rank, lora_alpha
            distiller.adapt_body()
    except ValueError as error:
        raise ConfigError(
            f"cannot make a distiller of {model}: {first_line(error)}; use a model whose class "
            f"transformers itself has"
        ) from error
    embeddings_VD = distiller.get_input_embeddings().weight.detach()
    embeddings_VD = embeddings_VD[: num_token_ids(model)]  # what follows pads the matrix
    if num_vectors > len(embeddings_VD):
        raise ConfigError(
            f"num_vectors is {num_vectors}, the vocabulary of {model} has {len(embeddings_VD)} "
            f"rows to begin with: lower it"
        )
    first = min(FIRST_PLAIN_ID, len(embeddings_VD) - num_vectors)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(embeddings_VD) - first, generator=generator)[:num_vectors] + first
    with torch.no_grad():
        distiller.prompt_embeddings_MD.copy_(embeddings_VD[drawn])
    distiller.hold_body()
    return distiller


def load_distiller(folder: Path, *, device: torch.device) -> Distiller:
    """Load a distiller in float32; raises ConfigError where the folder holds none.

    Raises StoreError for a step's distiller whose files have changed since.
    """
    require_whole(folder)
    transformers_logging.disable_progress_bar()
    try:
        config = DistillerConfig.get_config_dict(folder, local_files_only=True)[0]
        if config.get("model_type") != MODEL_TYPE:
            raise ConfigError(
                f"{folder} holds {config.get('model_type', 'no model')}, expected a distiller: "
                f"begin with a step of stage distiller_init"
            )
        distiller = open_pretrained(Distiller, folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the distiller {folder}: {first_line(error)}") from error
    assert isinstance(distiller, Distiller)
    distiller.hold_body()
    distiller.to(device)
    return distiller


def _random_body(config: PreTrainedConfig) -> Any:
    if not config.is_encoder_decoder:
        return built_from(AutoModel, config)
    given = deepcopy(config)  # T5's encoder writes into it
    return built_from(AutoModelForTextEncoding, given)


def _kind_of(config: PreTrainedConfig) -> Any:
    return AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel


def _body(model: Path, kind: Any) -> Any:
    transformers_logging.disable_progress_bar()
    try:
        return open_pretrained(kind, model, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot load {model}: {first_line(error)}") from error
