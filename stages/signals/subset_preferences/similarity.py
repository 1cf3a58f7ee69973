"""How like each demonstration is to the query: cosine of sentence embeddings.

Mean pooling over the encoder's last states and L2 normalisation, as sentence-transformers models of
the MiniLM kind are trained for (arXiv 1908.10084, section 3). Inputs are compared, not answers: the
query's answer is what the demonstrations are to help with.

Dimensions: M = demonstrations, B = texts, T = tokens, D = width of the encoder.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from schemas.errors import ConfigError, first_line
from schemas.tables.episodes import Episode
from stages.models.checkpoints.own_code import open_pretrained
from stages.models.checkpoints.tokenizer import open_tokenizer


class SentenceSimilarity:
    """A sentence encoder, and the tokenizer that turns an episode's ids back into text."""

    def __init__(self, encoder: Path, *, texts_of: Path) -> None:
        """Load both, the encoder on the CPU in float32; raises ConfigError if it cannot be."""
        transformers_logging.disable_progress_bar()
        try:
            self._model: Any = open_pretrained(AutoModel, encoder).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"sampler.encoder {encoder} cannot be loaded: {first_line(error)}"
            ) from error
        self._tokenizer = open_tokenizer(encoder)
        self._decoder = open_tokenizer(texts_of)

    def of(self, episode: Episode) -> npt.NDArray[np.float32]:
        """Return the similarity [M] of each demonstration's input to the query, from -1 to 1."""
        spans = [(start, answer) for start, answer, _ in episode.demonstrations_M3.tolist()]
        spans.append((episode.query_start, episode.answer_start))
        texts = [self._decoder.decode(episode.input_ids_T[a:b].tolist()) for a, b in spans]
        vectors_BD = self._embed([text.strip() for text in texts])
        similarity_M: npt.NDArray[np.float32] = (vectors_BD[:-1] @ vectors_BD[-1]).numpy()
        return similarity_M

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> Tensor:
        batch = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        states_BTD = self._model(**batch).last_hidden_state
        mask_BT1 = batch["attention_mask"][:, :, None].to(states_BTD.dtype)
        mean_BD = (states_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)
        return torch.nn.functional.normalize(mean_BD, dim=1)
