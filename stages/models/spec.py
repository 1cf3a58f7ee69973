"""A model to run and how wide its engine runs, as a recipe says it; no torch.

What ``EngineOptions`` says is part of a recipe's execution and never hashed, but for extra
arguments of an engine that move numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from schemas.storage.files import Folder
from stages.models.checkpoints.adapters import merged_folder
from stages.models.checkpoints.checkpoint import local_copy, require_whole
from stages.models.checkpoints.own_code import trust

HeadCheck = Literal["transformers", "engine", "off"]


# Arguments of vLLM's that decide what it computes, not merely where and in which order.
MOVE_NUMBERS = (
    "additional_config",
    "attention_config",
    "compilation_config",
    "config_format",
    "disable_sliding_window",
    "enable_mamba_cache_stochastic_rounding",
    "hf_config_path",
    "hf_overrides",
    "ignore_patterns",
    "kv_cache_dtype",
    "kv_cache_dtype_skip_layers",
    "kv_sharing_fast_prefill",
    "load_format",
    "logits_processors",
    "lora_dtype",
    "lora_target_modules",
    "mamba_cache_dtype",
    "mamba_ssm_cache_dtype",
    "model_class_overrides",
    "model_impl",
    "model_loader_extra_config",
    "model_weights",
    "override_generation_config",
    "quantization",
    "quantization_config",
    "revision",
    "speculative_config",
    "use_fp64_gumbel",
    "watermark",
    "watermark_config",
    "worker_cls",
    "worker_extension_cls",
)
_CPU_CACHE_BYTES = 2 << 30
SET_HERE = (
    "block_size",
    "convert",
    "distributed_executor_backend",
    "dtype",
    "enable_chunked_prefill",
    "enable_lora",
    "enable_prefix_caching",
    "enforce_eager",
    "generation_config",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "logprobs_mode",
    "max_logprobs",
    "max_lora_rank",
    "max_model_len",
    "max_num_batched_tokens",
    "model",
    "pipeline_parallel_size",
    "pooler_config",
    "runner",
    "tensor_parallel_size",
    "trust_remote_code",
    "use_tqdm_on_load",
)


class EngineOptions(BaseModel):
    """Settings of both engines; ``None`` leaves a choice to the engine.

    ``kv_cache_memory_bytes`` is per device, in place of ``gpu_memory_utilization`` (on a CPU: 2
    GiB, taken as they are written). ``max_num_batched_tokens`` bounds one forward pass.
    ``enforce_eager`` unset means compiled on a GPU, eager on a CPU: there compiling took 90 s and
    gained 10 % (SmolLM2-135M, 2 cores).
    ``head_check`` is what the start-up check of an engine's log-probs compares them with: a plain
    forward of ``transformers``, which loads the whole model once more; the same ``engine``'s own,
    which finds a head that is not read right and nothing that both get wrong; or nothing (``off``).
    Unset, it is transformers for models that fit the memory and are not quantised. A shard's record
    says which it was.
    ``extra`` are more arguments for vLLM, passed as they stand; those of ``MOVE_NUMBERS`` are part
    of a model's name, unlike all else here.
    ``num_threads`` are a worker's own on a CPU (default: what the process has); another number
    moves last bits, so runs that are to give equal bytes on unlike machines name one.
    ``cache_dir`` keeps the references of the start-up check (default: the user's cache folder).
    The transformers engine reads ``device``, ``max_model_len``, ``max_num_batched_tokens``,
    ``head_check``, ``num_threads`` and ``cache_dir``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    enable_chunked_prefill: bool | None = None
    enforce_eager: bool | None = None
    head_check: HeadCheck | None = None
    extra: dict[str, Any] = Field(default_factory=dict)
    num_threads: int | None = Field(default=None, ge=1)
    cache_dir: Path | None = None

    @field_validator("head_check", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # as YAML reads a bare off

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for name in extra:
            if name in SET_HERE:
                raise ValueError(
                    f"'{name}' is set by the engine itself or by a setting of its own beside "
                    f"'extra': leave it out here"
                )
        return extra

    @property
    def extra_in_name(self) -> dict[str, Any]:
        """Those of ``extra`` that move a model's numbers beyond rounding."""
        return {name: value for name, value in self.extra.items() if name in MOVE_NUMBERS}

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that a vLLM engine on a CPU sets aside; it may write fewer."""
        return self.kv_cache_memory_bytes or _CPU_CACHE_BYTES

    @property
    def num_devices(self) -> int:
        """Devices of one engine: a model's layers are cut in both ways."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as a stage sees it: where it lies, a dtype and an engine.

    ``adapter`` is a PEFT adapter on ``base``, a folder or what a step left, ``merged_name`` a hash
    of what both hold and of the dtype. ``trust_remote_code`` lets the Python files of ``base`` run.
    """

    base: Folder
    dtype: str
    engine: Literal["vllm", "transformers"]
    hidden_size: int
    adapter: Folder | None = None
    merged_name: str = ""
    trust_remote_code: bool = False

    def admit_code(self) -> None:
        """Let this process run the code that the model's folder brings, or forbid it."""
        if isinstance(self.base, Path):  # a folder in a store is a step's, which brings none
            trust(self.base, self.trust_remote_code)

    @property
    def path(self) -> Path:
        """An ordinary transformers folder of this machine, made when first asked.

        An adapter is merged into its base, a model in an object store is fetched.
        """
        adapter = self.local_adapter
        if adapter is None:
            return self.local_base
        require_whole(adapter)
        return merged_folder(self.local_base, adapter, dtype=self.dtype, name=self.merged_name)

    @property
    def local_adapter(self) -> Path | None:
        """``adapter`` on this machine."""
        return None if self.adapter is None else local_copy(self.adapter)

    @property
    def local_base(self) -> Path:
        """``base`` on this machine, without the adapter."""
        return local_copy(self.base)


def is_one_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two identities are of one model, whatever dtype and engine it is run in."""
    how = ("dtype", "engine", "engine_extra")
    without = [
        {name: value for name, value in identity.items() if name not in how}
        for identity in (one, other)
    ]
    return without[0] == without[1]
