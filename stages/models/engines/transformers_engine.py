"""The transformers engine: for machines without vLLM, and for audits of it.

Sequences are sorted by length and padded on the right, where a causal model cannot see the padding
from real tokens; results come back in the order given. Only the base model runs: no [T, V] logits.

Dimensions: B = sequences of a batch, T = tokens, D = hidden width.
"""

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from schemas.errors import EngineError, first_line
from stages.models.causal_lm.kept_keys import keeps_keys
from stages.models.causal_lm.language_head import LanguageHead, max_positions, read_config
from stages.models.checkpoints.own_code import open_pretrained
from stages.models.engines.sequences import (
    PrefixGroup,
    TokenIds,
    check_sequences,
    prefix_groups,
    windows,
)
from stages.models.spec import EngineOptions, HeadCheck

BATCH_TOKENS = 4096


class TransformersEngine:
    """An ``AutoModelForCausalLM`` without its head; see ``Engine`` for what the members promise."""

    head_check: HeadCheck = "off"
    kind = "transformers"

    def __init__(
        self, model_path: Path, *, dtype: torch.dtype, device: torch.device, options: EngineOptions
    ) -> None:
        """Load the model. Raises EngineError if transformers cannot."""
        config = read_config(model_path).get_text_config()
        self.device = device
        self.window = window_of(config)
        self.max_length = min(self.window, options.max_model_len or self.window)
        self.head = LanguageHead.from_model_folder(model_path, device=device, dtype=dtype)
        self._batch_tokens = options.max_num_batched_tokens or BATCH_TOKENS
        self._model: Any = _load(model_path, dtype, device)

    def hidden_states(self, sequences: Sequence[TokenIds]) -> Iterator[Tensor]:
        """Yield [T, D] for each sequence, in the order given."""
        vocab_size = self.head.vocab_size
        check_sequences(sequences, max_length=self.max_length, vocab_size=vocab_size)
        bytes_per_token = self.head.weight_VD.shape[1] * self.head.dtype.itemsize
        for window in windows(sequences, bytes_per_token=bytes_per_token):
            yield from self._run(window)

    def last_hidden_states(
        self, sequences: Sequence[TokenIds], counts: Sequence[int]
    ) -> list[Tensor]:
        """Return [n, D] for the last n positions of each sequence.

        A prefix that sequences share is run once and its keys and values are used by all of them;
        where a model keeps a state in their place, each sequence is run whole.
        """
        check_sequences(sequences, max_length=self.max_length, vocab_size=self.head.vocab_size)
        results: dict[int, Tensor] = {}
        alone: list[int] = []
        groups: Iterable[PrefixGroup] = [PrefixGroup([*range(len(sequences))], 0)]
        if keeps_keys(self._model):
            groups = prefix_groups(sequences, counts, max_tokens=self._batch_tokens)
        for group in groups:
            if not group.shared:
                alone.extend(group.members)
                continue
            hidden_BTD = self._forward([sequences[i] for i in group.members], group.shared)
            for row, index in enumerate(group.members):
                end = len(sequences[index]) - group.shared
                results[index] = hidden_BTD[row, end - counts[index] : end].clone()
        for batch in batches([len(sequences[index]) for index in alone], self._batch_tokens):
            members = [alone[place] for place in batch]
            hidden_BTD = self._forward([sequences[index] for index in members])
            for row, index in enumerate(members):
                end = len(sequences[index])
                results[index] = hidden_BTD[row, end - counts[index] : end].clone()
        return [results[index] for index in range(len(sequences))]

    def close(self) -> None:
        """Free the model and its memory."""
        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, window: Sequence[TokenIds]) -> list[Tensor]:
        """Return the window's hidden states; views of the batches they were computed in."""
        results: dict[int, Tensor] = {}
        for batch in batches([len(ids_T) for ids_T in window], self._batch_tokens):
            hidden_BTD = self._forward([window[index] for index in batch])
            for row, index in enumerate(batch):
                results[index] = hidden_BTD[row, : len(window[index])]
        return [results[index] for index in range(len(window))]

    @torch.no_grad()
    def _forward(self, sequences: Sequence[TokenIds], shared: int = 0) -> Tensor:
        """Return [B, T', D] states of what follows the first ``shared`` tokens, which all have."""
        if self._model is None:
            raise EngineError("the transformers engine is closed: open it again")
        after_prefix: dict[str, Any] = {"use_cache": False}
        if shared:
            cache = self._run_prefix(sequences[0][:shared], len(sequences))
            after_prefix = {"past_key_values": cache, "use_cache": True}
        longest = max(len(ids_T) for ids_T in sequences)
        input_ids_BT = torch.zeros((len(sequences), longest), dtype=torch.long)
        mask_BT = torch.zeros_like(input_ids_BT)
        for row, ids_T in enumerate(sequences):
            input_ids_BT[row, : len(ids_T)] = torch.from_numpy(ids_T.astype("int64"))
            mask_BT[row, : len(ids_T)] = 1
        output = self._model(
            input_ids=input_ids_BT[:, shared:].to(self.device),
            attention_mask=mask_BT.to(self.device),
            **after_prefix,
        )
        hidden_BTD = output.last_hidden_state
        assert isinstance(hidden_BTD, Tensor)
        return hidden_BTD

    def _run_prefix(self, prefix_T: TokenIds, num_sequences: int) -> Any:
        """Return the prefix's keys and values, repeated for each sequence."""
        input_ids_1T = torch.from_numpy(prefix_T.astype("int64"))[None].to(self.device)
        cache = self._model(input_ids=input_ids_1T, use_cache=True).past_key_values
        cache.batch_repeat_interleave(num_sequences)
        return cache


def _load(model_path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    with loading(model_path, device):
        model = open_pretrained(AutoModelForCausalLM, model_path, dtype=dtype)
        return model.base_model.eval().to(device)


@contextmanager
def loading(model_path: Path, device: torch.device) -> Iterator[None]:
    """Raise EngineError for what transformers says of a model that it cannot load."""
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineError(
            f"transformers cannot load {model_path} on {device}: {first_line(error)}"
        ) from error


def window_of(config: Any) -> int:
    """Return the tokens that a sequence may have by a model's text config.

    Some models have no such limit and say none (ALiBi, as BLOOM and MPT, and state spaces).
    """
    limit = max_positions(config)
    return sys.maxsize if limit is None else limit


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield indices of like lengths, longest first; a batch padded to its first fits."""
    batch: list[int] = []
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for index in longest_first:
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
