"""The transformers engine of an encoder-decoder: states behind the tokens that a decoder says.

Rows are sorted by length and padded on the right, the encoder's padding under a mask; results come
back in the order given.

Dimensions: B = rows of a batch, A = tokens that the decoder says, D = hidden width.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stages.models.causal_lm.language_head import LanguageHead, read_config
from stages.models.encoder_decoder.halves import Frame, Ids, frame_of
from stages.models.encoder_decoder.model import (
    decoder_states,
    encoder_states,
    open_encoder_decoder,
    padded,
)
from stages.models.engines.engine import DTYPES, device_of, set_threads
from stages.models.engines.head_check import (
    answers_of,
    check_head,
    chosen_check,
    probe_sequences,
    reference_of,
)
from stages.models.engines.sequences import TokenIds, check_sequences
from stages.models.engines.transformers_engine import BATCH_TOKENS, batches, loading, window_of
from stages.models.spec import EngineOptions, HeadCheck, ModelSpec


class Read(NamedTuple):
    """A row as the engine takes it: the encoder's text, and what the decoder says after it."""

    text_ids: TokenIds
    said_ids: TokenIds


class EncoderDecoderEngine:
    """An encoder-decoder without its head, which is beside it as in an ``Engine``.

    ``window`` is the model's own for either half, the tokens of ``frame`` included; ``max_length``
    is what settings leave of it.
    """

    def __init__(
        self, model_path: Path, *, dtype: torch.dtype, device: torch.device, options: EngineOptions
    ) -> None:
        """Load the model. Raises EngineError if transformers cannot."""
        config = read_config(model_path)
        frame = frame_of(config, model_path)
        assert frame is not None, "an encoder-decoder"
        self.frame: Frame = frame
        self.device = device
        self.head_check: HeadCheck = "off"
        self.window = window_of(config)
        self.max_length = min(self.window, options.max_model_len or self.window)
        self.head = LanguageHead.from_model_folder(model_path, device=device, dtype=dtype)
        self._batch_tokens = options.max_num_batched_tokens or BATCH_TOKENS
        with loading(model_path, device):
            self._model = open_encoder_decoder(model_path, dtype=dtype).eval().to(device)

    def longest_half(self, row: Read) -> int:
        """Return the tokens of the longer half, what the frame adds included."""
        frame = self.frame
        return max(len(frame.encoder_ids(row.text_ids)), len(frame.decoder_ids(row.said_ids)) - 1)

    def said_states(self, rows: Sequence[Read]) -> list[Tensor]:
        """Return [A, D] for each row: state j is what token j of ``said_ids`` is predicted from.

        Raises EngineError for a half that is empty, too long or outside the vocabulary.
        """
        texts, read = self._halves(rows)
        for half in (texts, read):
            check_sequences(half, max_length=self.max_length, vocab_size=self.head.vocab_size)
        return self._states(texts, read)

    def answers(self, probes: Sequence[TokenIds]) -> list[Tensor]:
        """Return [T, V] log-probs of each probe, in both halves, whatever ``max_length`` is."""
        states = self._states(*self._halves([Read(ids_T, ids_T) for ids_T in probes]))
        return answers_of(iter(states), self.head)

    def close(self) -> None:
        """Free the model and its memory; a closed engine cannot be used again."""
        del self._model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _halves(self, rows: Sequence[Read]) -> tuple[list[Ids], list[Ids]]:
        """Return what the encoder reads of each row, and what the decoder does."""
        texts = [self.frame.encoder_ids(row.text_ids) for row in rows]
        return texts, [self.frame.decoder_ids(row.said_ids)[:-1] for row in rows]

    def _states(self, texts: Sequence[Ids], read: Sequence[Ids]) -> list[Tensor]:
        results: dict[int, Tensor] = {}
        lengths = [len(text) + len(said) for text, said in zip(texts, read, strict=True)]
        for batch in batches(lengths, self._batch_tokens):
            states_BAD = self._forward([texts[i] for i in batch], [read[i] for i in batch])
            for place, index in enumerate(batch):
                results[index] = states_BAD[place, : len(read[index])].clone()
        return [results[index] for index in range(len(texts))]

    @torch.no_grad()
    def _forward(self, texts: Sequence[Ids], read: Sequence[Ids]) -> Tensor:
        text_ids_BE, mask_BE = (tensor.to(self.device) for tensor in padded(texts))
        decoder_ids_BA = padded(read)[0].to(self.device)
        embedded_BED = self._model.get_input_embeddings()(text_ids_BE)
        encoded_BED = encoder_states(self._model, embedded_BED, mask_BE)
        return decoder_states(self._model, encoded_BED, mask_BE, decoder_ids_BA)


@contextmanager
def open_encoder_decoder_engine(
    model: ModelSpec, options: EngineOptions
) -> Iterator[EncoderDecoderEngine]:
    """Load a model into an engine, check its head, free it on exit; see ``open_engine``."""
    set_threads(options)
    device, dtype, folder = device_of(options), DTYPES[model.dtype], model.path
    check = chosen_check(folder, dtype=dtype, device=device, options=options)
    check = "off" if check == "off" else "transformers"
    reference = None
    if check != "off":
        cache_dir = options.cache_dir
        reference = reference_of(folder, dtype=dtype, device=device, cache_dir=cache_dir)
    engine = EncoderDecoderEngine(folder, dtype=dtype, device=device, options=options)
    engine.head_check = check
    try:
        if reference is not None:
            answers = engine.answers(probe_sequences(engine.head.vocab_size))
            check_head(answers, reference, engine.head.dtype, folder)
        yield engine
    finally:
        engine.close()
