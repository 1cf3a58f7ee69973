"""The transformers generator: for machines without vLLM, and for audits of it.

``generate`` runs the model on prompts of like lengths, padded on the left under an attention mask
(of equal lengths, where a model keeps a state: ``stages.models.causal_lm.kept_keys``).
Which token comes next is decided here: a logits processor, the only one, reads the logits as the
model gives them, keeps the log-probs, draws the token, and leaves ``generate`` no other. So the
log-probs kept are the ones the token was drawn by, and no second forward pass is needed.

A draw is the inverse of the distribution function, over tokens by falling probability, at a number
that depends on seed and position alone: batches and devices do not move it.

Dimensions: B = prompts of a batch, T = tokens of the longest, V = vocabulary, A = generated
tokens, K = likeliest tokens kept at each of them.
"""

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from schemas.distribution import uniforms
from schemas.errors import EngineError
from stages.models.causal_lm.kept_keys import equally_long, keeps_keys, keeps_some_keys
from stages.models.causal_lm.language_head import read_config
from stages.models.checkpoints.own_code import open_pretrained
from stages.models.engines.decoding import Decoding, Generated
from stages.models.engines.sequences import TokenIds, check_sequences
from stages.models.engines.transformers_engine import batches, loading, window_of
from stages.models.spec import EngineOptions

_BATCH_TOKENS = 16_384  # keys and values of this many are held at a time


class TransformersGenerator:
    """An ``AutoModelForCausalLM``; see ``Generator`` for what the members promise."""

    kind = "transformers"

    def __init__(
        self, model_path: Path, *, dtype: torch.dtype, device: torch.device, options: EngineOptions
    ) -> None:
        """Load the model. Raises EngineError if transformers cannot."""
        config = read_config(model_path).get_text_config()
        self.device = device
        self.vocab_size = int(config.vocab_size)
        self.window = window_of(config)
        self.max_length = min(self.window, options.max_model_len or self.window)
        self._batch_tokens = options.max_num_batched_tokens or _BATCH_TOKENS
        self._model: Any = _load(model_path, dtype, device)
        self._model.generation_config = GenerationConfig()  # nothing the folder suggests

    def generate(
        self, prompts: Sequence[TokenIds], seeds: Sequence[int], decoding: Decoding
    ) -> Iterator[Generated]:
        """Yield a response to each prompt, in the order given."""
        if self._model is None:
            raise EngineError("the transformers engine is closed: open it again")
        room = self.max_length - decoding.max_tokens
        check_sequences(prompts, max_length=room, vocab_size=self.vocab_size)
        assert len(prompts) == len(seeds)
        results: dict[int, Generated] = {}
        lengths = [len(prompt_T) + decoding.max_tokens for prompt_T in prompts]
        for batch in self._batches(lengths):
            drawer = _Drawer([seeds[index] for index in batch], decoding)
            self._run([prompts[index] for index in batch], drawer, decoding)
            results.update(zip(batch, drawer.responses(), strict=True))
        yield from (results[index] for index in range(len(prompts)))

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the prompts that stand together."""
        for batch in batches(lengths, self._batch_tokens):
            yield from [batch] if keeps_keys(self._model) else equally_long(batch, lengths)

    def close(self) -> None:
        """Free the model and its memory."""
        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _run(self, prompts: Sequence[TokenIds], drawer: "_Drawer", decoding: Decoding) -> None:
        width = max(len(prompt_T) for prompt_T in prompts)
        input_ids_BT = torch.zeros((len(prompts), width), dtype=torch.long)
        mask_BT = torch.zeros_like(input_ids_BT)
        for row, prompt_T in enumerate(prompts):
            input_ids_BT[row, width - len(prompt_T) :] = torch.from_numpy(prompt_T.astype("int64"))
            mask_BT[row, width - len(prompt_T) :] = 1
        self._model.generate(
            inputs=input_ids_BT.to(self.device),
            attention_mask=mask_BT.to(self.device),
            logits_processor=LogitsProcessorList([drawer]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=decoding.max_tokens,
                eos_token_id=list(decoding.stop_token_ids),
                pad_token_id=decoding.stop_token_ids[0],
                use_cache=keeps_some_keys(self._model),
            ),
        )


class _Drawer(LogitsProcessor):  # type: ignore[misc]
    """Draws the next token of each row of a batch, and keeps what was known of it."""

    def __init__(self, seeds: Sequence[int], decoding: Decoding) -> None:
        self.decoding = decoding
        self.ids: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.top_ids: list[Tensor] = []
        self.top_logprobs: list[Tensor] = []
        by_row = [uniforms(seed, decoding.max_tokens, 1)[:, 0] for seed in seeds]
        self.uniforms_BA = torch.from_numpy(np.stack(by_row))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return [B, V] scores that leave one token each."""
        logits_BV = scores.float()
        logprobs_BV = logits_BV.log_softmax(dim=-1)
        uniforms_B = self.uniforms_BA[:, len(self.ids)].to(scores.device)
        chosen_B1 = draw_tokens(logits_BV, uniforms_B, self.decoding)[:, None]
        top_logprobs_BK, top_ids_BK = logprobs_BV.topk(self.decoding.top_k)
        self.ids.append(chosen_B1[:, 0].cpu())
        self.logprobs.append(logprobs_BV.gather(1, chosen_B1)[:, 0].cpu())
        self.top_ids.append(top_ids_BK.cpu())
        self.top_logprobs.append(top_logprobs_BK.cpu())
        return torch.full_like(logits_BV, -torch.inf).scatter(1, chosen_B1, 0.0)

    def responses(self) -> Iterator[Generated]:
        """Yield each row's tokens up to its first stop token; what comes after is padding."""
        ids_BA, logprobs_BA = _stacked(self.ids), _stacked(self.logprobs)
        top_ids_BAK, top_logprobs_BAK = _stacked(self.top_ids), _stacked(self.top_logprobs)
        is_stop_BA = np.isin(ids_BA, self.decoding.stop_token_ids)
        for row, is_stop_A in enumerate(is_stop_BA):
            stopped = bool(is_stop_A.any())
            end = int(is_stop_A.argmax()) + 1 if stopped else len(is_stop_A)
            yield Generated(
                ids_BA[row, :end],
                logprobs_BA[row, :end],
                top_ids_BAK[row, :end],
                top_logprobs_BAK[row, :end],
                stopped,
            )


def draw_tokens(logits_BV: Tensor, uniforms_B: Tensor, decoding: Decoding) -> Tensor:
    """Return the next token [B] of each row: the likeliest at temperature 0, else a draw.

    ``top_p`` keeps the likeliest tokens until they hold that much, the one that reaches it too.
    """
    if decoding.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probs_BV = (logits_BV.double() / decoding.temperature).softmax(dim=-1)
    probs_BV, ids_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    mass_BV = probs_BV.cumsum(dim=-1)
    num_kept_B1 = (mass_BV - probs_BV < decoding.top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    kept_mass_B1 = mass_BV.gather(1, num_kept_B1 - 1)
    places_B1 = (mass_BV <= uniforms_B[:, None] * kept_mass_B1).sum(dim=-1, keepdim=True)
    return ids_BV.gather(1, torch.minimum(places_B1, num_kept_B1 - 1))[:, 0]


def _stacked(steps: Sequence[Tensor]) -> npt.NDArray[Any]:
    return torch.stack(list(steps), dim=1).numpy()


def _load(model_path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    with loading(model_path, device):
        return open_pretrained(AutoModelForCausalLM, model_path, dtype=dtype).eval().to(device)
