"""The start-up check: an engine's hidden states through our head against an ordinary forward pass.

The reference is ``AutoModelForCausalLM`` on two short sequences of fixed random tokens: the 64
largest log-probs of each position. It is computed and freed before the engine takes the device's
memory, and kept on disk, keyed by the model's files and the dtype, so that a job's other workers
do not load the model twice. The measure is the mean absolute difference of those log-probs.

Tolerances (nats). A head that is wrong (a missing soft-cap, scale or bias, other weights) is off by
whole nats; what is right differs by the order of sums and by where numbers are rounded:

- float32: 0.01. Measured 8e-6 (vLLM on SmolLM2-135M, CPU); attention on a GPU may use TF32, which
  rounds its inputs to 2^-11.
- float16: 0.05, bfloat16: 0.25. Transformers rounds logits to the model's dtype: steps of 2^-6 and
  2^-3 between 16 and 32, and the hidden states carry as much again. Measured in bfloat16: 0.06.

Dimensions: T = tokens, P = positions, K = kept log-probs, V = vocabulary.
"""

import contextlib
import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from schemas.errors import EngineError
from schemas.storage.files import write_text
from schemas.storage.shard_cache import user_cache
from stages.models.causal_lm.language_head import LanguageHead, read_config
from stages.models.checkpoints.adapters import adapted_model
from stages.models.engines.sequences import TokenIds

TOLERANCES = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.25}

_PROBE_LENGTHS = (8, 24)
_NUM_KEPT = 64


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers says about the probes, one entry a probe."""

    token_ids: list[list[list[int]]]
    logprobs: list[list[list[float]]]


def probe_sequences(vocab_size: int) -> list[TokenIds]:
    """Return fixed random ids away from both ends of the vocabulary, where special tokens live."""
    draw = np.random.default_rng(0)
    low, high = vocab_size // 8, max(vocab_size // 2, vocab_size // 8 + 1)
    return [draw.integers(low, high, length) for length in _PROBE_LENGTHS]


def reference_of(
    model_path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    cache_dir: Path | None,
    adapter: Path | None = None,
) -> Reference:
    """Return the reference of a model folder, with a PEFT adapter if one is given.

    From disk or computed now. Raises ConfigError if it is no model folder, EngineError if
    transformers cannot run it.
    """
    key = _key([model_path, *([adapter] if adapter else [])], dtype)
    file = (cache_dir or user_cache() / "head_check") / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # none yet, or a damaged one
        return Reference(**json.loads(file.read_text()))
    reference = _computed(model_path, dtype, device, adapter)
    with contextlib.suppress(OSError, EngineError):
        write_text(file, json.dumps(asdict(reference)))
    return reference


def check_head(
    hidden_states: Iterator[Tensor], head: LanguageHead, reference: Reference, model_path: Path
) -> None:
    """Raise EngineError unless ``head`` on the probes' hidden states gives the reference."""
    errors = []
    references = zip(reference.token_ids, reference.logprobs, strict=True)
    for hidden_TD, (token_ids, logprobs) in zip(hidden_states, references, strict=True):
        rows = len(hidden_TD)
        logprobs_TV = head.logits(hidden_TD).log_softmax(-1).cpu()
        got_TK = logprobs_TV.gather(1, torch.tensor(token_ids[:rows]))
        errors.append((got_TK - torch.tensor(logprobs[:rows])).abs().flatten())
    error, tolerance = float(torch.cat(errors).mean()), TOLERANCES[head.dtype]
    if not error <= tolerance:
        raise EngineError(
            f"{model_path}: the engine's log-probs differ from transformers by {error:.3g} nats on "
            f"average, expected at most {tolerance} in {head.dtype}: the head or the engine does "
            f"not reproduce this model; use another engine or model"
        )


def _computed(
    model_path: Path, dtype: torch.dtype, device: torch.device, adapter: Path | None
) -> Reference:
    probes = probe_sequences(int(read_config(model_path).get_text_config().vocab_size))
    # "auto" spreads a model that is larger than the device over the others and the CPU.
    device_map = "auto" if device.type == "cuda" else None
    model: Any = None
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, device_map=device_map, local_files_only=True
        ).eval()
        if adapter is not None:
            model = adapted_model(model, adapter, model_path).eval()
        kept = [_kept(model, ids_T) for ids_T in probes]
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineError(
            f"transformers cannot run {model_path} for the start-up check: "
            f"{str(error).splitlines()[0]}"
        ) from error
    finally:
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Reference(
        token_ids=[token_ids_PK.tolist() for token_ids_PK, _ in kept],
        logprobs=[logprobs_PK.tolist() for _, logprobs_PK in kept],
    )


@torch.inference_mode()
def _kept(model: Any, ids_T: TokenIds) -> tuple[Tensor, Tensor]:
    """Return ids and values of the largest log-probs of every position of one probe."""
    input_ids = torch.from_numpy(ids_T)[None].to(model.device)
    logprobs_TV = model(input_ids=input_ids, use_cache=False).logits[0].float().log_softmax(-1)
    logprobs_PK, token_ids_PK = logprobs_TV.topk(min(_NUM_KEPT, logprobs_TV.shape[-1]))
    return token_ids_PK, logprobs_PK


def _key(folders: Sequence[Path], dtype: torch.dtype) -> str:
    """Hash what the reference depends on, without reading the weights."""
    parts = [transformers.__version__, str(dtype), str(_PROBE_LENGTHS), str(_NUM_KEPT)]
    for file in (file for folder in folders for file in sorted(folder.glob("*"))):
        if file.suffix in (".safetensors", ".bin", ".json"):
            stat = file.stat()
            parts.append(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}")
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
