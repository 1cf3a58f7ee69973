"""A model to run and how wide its engine runs, as a recipe says it; no torch.

What ``EngineOptions`` says is part of a recipe's execution and never hashed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.storage.files import Folder
from stages.models.checkpoints.adapters import merged_folder
from stages.models.checkpoints.checkpoint import local_copy


class EngineOptions(BaseModel):
    """Settings of both engines; ``None`` leaves a choice to the engine.

    ``kv_cache_memory_bytes`` is per device, in place of ``gpu_memory_utilization`` (on a CPU: 2
    GiB). ``max_num_batched_tokens`` bounds one forward pass. ``enforce_eager`` unset means compiled
    on a GPU, eager on a CPU: there compiling took 90 s and gained 10 % (SmolLM2-135M, 2 cores).
    ``num_threads`` are a worker's own on a CPU (default: what the process has); another number
    moves last bits, so runs that are to give equal bytes on unlike machines name one.
    ``cache_dir`` keeps the references of the start-up check (default: the user's cache folder).
    The transformers engine reads ``device``, ``max_model_len``, ``max_num_batched_tokens``,
    ``num_threads`` and ``cache_dir``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensor_parallel_size: int = Field(default=1, ge=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    enable_chunked_prefill: bool | None = None
    enforce_eager: bool | None = None
    num_threads: int | None = Field(default=None, ge=1)
    cache_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as a stage sees it: where it lies, a dtype and an engine.

    ``adapter`` is a PEFT adapter on ``base``, ``merged_name`` a hash of what both hold and of
    the dtype.
    """

    base: Folder
    dtype: str
    engine: Literal["vllm", "transformers"]
    hidden_size: int
    adapter: Path | None = None
    merged_name: str = ""

    @property
    def path(self) -> Path:
        """An ordinary transformers folder of this machine, made when first asked.

        An adapter is merged into its base, a model in an object store is fetched.
        """
        if self.adapter is None:
            return self.local_base
        return merged_folder(self.local_base, self.adapter, dtype=self.dtype, name=self.merged_name)

    @property
    def local_base(self) -> Path:
        """``base`` on this machine, without the adapter."""
        return local_copy(self.base)
