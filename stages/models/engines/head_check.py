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

A model that transformers cannot load beside the engine (too large, or quantised) is checked against
the engine itself: vLLM's own prompt log-probs on the same probes, from a start in generate mode.
That finds a head that is read wrong, and nothing that both of its modes get wrong.

An adapter moves log-probs by less than the tolerance in half precision, so an engine that loads it
and leaves it out would pass. What is looked at beside is the difference that it makes, base to
adapted, over the tokens that are among the largest of both.

Dimensions: T = tokens, P = positions, K = kept log-probs, V = vocabulary, M = log-probs in all.
"""

import contextlib
import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.utils import logging as transformers_logging

from schemas.errors import EngineError, first_line
from schemas.storage.checksums import remembered_sha256
from schemas.storage.files import write_text
from schemas.storage.shard_cache import user_cache
from stages.models.available_memory import available_memory
from stages.models.causal_lm.language_head import LanguageHead, read_config
from stages.models.checkpoints.adapters import adapted_model
from stages.models.checkpoints.own_code import code_files, is_trusted, open_pretrained
from stages.models.encoder_decoder.halves import frame_of
from stages.models.engines.memory import weight_bytes
from stages.models.engines.sequences import TokenIds
from stages.models.engines.vllm_generator import VllmGenerator, installed_vllm
from stages.models.spec import EngineOptions, HeadCheck

TOLERANCES = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.25}

_PROBE_LENGTHS = (8, 24)
_NUM_KEPT = 64


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers says about the probes, one entry a probe."""

    token_ids: list[list[list[int]]]
    logprobs: list[list[list[float]]]

    def at(self, probe: int, position: int) -> dict[int, float]:
        """Return the log-probs at one position, by token."""
        token_ids_K, logprobs_K = self.token_ids[probe][position], self.logprobs[probe][position]
        return dict(zip(token_ids_K, logprobs_K, strict=True))


def probe_sequences(vocab_size: int) -> list[TokenIds]:
    """Return fixed random ids away from both ends of the vocabulary, where special tokens live."""
    draw = np.random.default_rng(0)
    low, high = vocab_size // 8, max(vocab_size // 2, vocab_size // 8 + 1)
    return [draw.integers(low, high, length) for length in _PROBE_LENGTHS]


def chosen_check(
    model_path: Path, *, dtype: torch.dtype, device: torch.device, options: EngineOptions
) -> HeadCheck:
    """Return which check to make: the one that is asked for, else what the memory allows."""
    if options.head_check is not None:
        return options.head_check
    if getattr(read_config(model_path), "quantization_config", None) is not None:
        return "engine"
    free = available_memory()
    if device.type == "cuda":  # transformers spreads what a GPU does not hold over the CPU
        free += torch.cuda.mem_get_info()[0] if free else 0
    return "engine" if 0 < free < weight_bytes(model_path, dtype) else "transformers"


def reference_of(
    model_path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    cache_dir: Path | None,
    adapter: Path | None = None,
) -> Reference:
    """Return what transformers says of a model folder, with a PEFT adapter if one is given.

    From disk or computed now. Raises ConfigError if it is no model folder, EngineError if
    transformers cannot run it.
    """
    key = _key([model_path, *([adapter] if adapter else [])], dtype, transformers.__version__)
    return _remembered(key, cache_dir, lambda: _computed(model_path, dtype, device, adapter))


def own_reference_of(
    model_path: Path, *, dtype: torch.dtype, device: torch.device, options: EngineOptions
) -> Reference:
    """Return what vLLM itself says of a model folder, from disk or computed now.

    Raises EngineError if it does not start.
    """

    def computed() -> Reference:
        generator = VllmGenerator(model_path, dtype=dtype, device=device, options=options)
        try:
            probes = probe_sequences(generator.vocab_size)
            fitting = [ids_T[: generator.max_length - 1] for ids_T in probes]
            found = list(generator.prompt_logprobs(fitting, min(_NUM_KEPT, generator.vocab_size)))
        finally:
            generator.close()
        return Reference([token_ids for token_ids, _ in found], [values for _, values in found])

    key = _key([model_path], dtype, f"vllm {installed_vllm()}")
    return _remembered(key, options.cache_dir, computed)


def _remembered(key: str, cache_dir: Path | None, computed: Callable[[], Reference]) -> Reference:
    file = (cache_dir or user_cache() / "head_check") / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # none yet, or a damaged one
        return Reference(**json.loads(file.read_text()))
    reference = computed()
    with contextlib.suppress(OSError, EngineError):
        write_text(file, json.dumps(asdict(reference)))
    return reference


def answers_of(hidden_states: Iterator[Tensor], head: LanguageHead) -> list[Tensor]:
    """Return [T, V] log-probs of each probe, by ``head`` on its hidden states, on the CPU."""
    return [head.logits(hidden_TD).log_softmax(-1).cpu() for hidden_TD in hidden_states]


def check_head(
    answers: Sequence[Tensor],
    reference: Reference,
    dtype: torch.dtype,
    model_path: Path,
    *,
    made_by: HeadCheck = "transformers",
) -> None:
    """Raise EngineError unless an engine's answers to the probes are the reference.

    That may end a position before the answers do, or after them. ``made_by`` is whose it is.
    """
    errors = []
    references = zip(reference.token_ids, reference.logprobs, strict=True)
    for logprobs_TV, (token_ids, logprobs) in zip(answers, references, strict=True):
        rows = min(len(logprobs_TV), len(token_ids))
        got_PK = logprobs_TV[:rows].gather(1, torch.tensor(token_ids[:rows]))
        errors.append((got_PK - torch.tensor(logprobs[:rows])).abs().flatten())
    error, tolerance = float(torch.cat(errors).mean()), TOLERANCES[dtype]
    if not error <= tolerance:
        other = {"transformers": "transformers", "engine": "the engine's own"}[made_by]
        raise EngineError(
            f"{model_path}: the engine's log-probs differ from {other} by {error:.3g} nats on "
            f"average, expected at most {tolerance} in {dtype}: the head or the engine does "
            f"not reproduce this model; use another engine or model, or leave engine.extra out"
        )


def check_adapter(
    base: Sequence[Tensor],
    adapted: Sequence[Tensor],
    references: tuple[Reference, Reference],
    adapter: Path,
) -> None:
    """Raise EngineError unless an engine's answers differ by as much as the references do.

    ``references`` are those of the base and of the adapted model. Where the difference stands out
    of what separates engine and reference on the base alone, its share that the engine shows (the
    slope of a regression through 0) is to be 0.5 to 1.5; where it does not, it is not to be 0.
    """
    got_M, wanted_M, error_M = _differences(base, adapted, references)
    size, error = (float(values_M.square().mean().sqrt()) for values_M in (wanted_M, error_M))
    if size == 0.0:  # as PEFT begins one: it makes no difference yet
        return
    share = float((got_M @ wanted_M) / wanted_M.square().sum())
    if not got_M.any() or (size > 2 * error and not 0.5 <= share <= 1.5):
        raise EngineError(
            f"{adapter}: the engine shows {share:.0%} of the difference that the adapter makes in "
            f"transformers ({size:.3g} nats), expected 100%: it does not serve all of this "
            f"adapter; save the adapted model as a full one"
        )


def require_difference(base: Sequence[Tensor], adapted: Sequence[Tensor], adapter: Path) -> None:
    """Raise EngineError where an engine answers with an adapter what it answers without."""
    if all(torch.equal(one, other) for one, other in zip(base, adapted, strict=True)):
        raise EngineError(
            f"{adapter}: the engine's answers with and without this adapter are the same: it does "
            f"not serve it, or the adapter does nothing; save the adapted model as a full one"
        )


def _differences(
    base: Sequence[Tensor], adapted: Sequence[Tensor], references: tuple[Reference, Reference]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [M] what the adapter adds in the engine and in the reference, and the base's error."""
    plain, tuned = references
    found: list[tuple[float, float, float]] = []
    for probe, (base_TV, adapted_TV) in enumerate(zip(base, adapted, strict=True)):
        for position in range(len(base_TV)):
            before, after = plain.at(probe, position), tuned.at(probe, position)
            for token in before.keys() & after.keys():
                here = float(base_TV[position, token])
                got = float(adapted_TV[position, token]) - here
                found.append((got, after[token] - before[token], here - before[token]))
    got_M, wanted_M, error_M = torch.tensor(found, dtype=torch.float64).reshape(-1, 3).T
    return got_M, wanted_M, error_M


def _computed(
    model_path: Path, dtype: torch.dtype, device: torch.device, adapter: Path | None
) -> Reference:
    probes = probe_sequences(int(read_config(model_path).get_text_config().vocab_size))
    # "auto" spreads a model that is larger than the device over the others and the CPU.
    device_map = "auto" if device.type == "cuda" else None
    model: Any = None
    known = (OSError, ValueError, RuntimeError)
    failures = (Exception,) if is_trusted(model_path) else known  # own code may raise anything
    transformers_logging.disable_progress_bar()
    has_decoder = frame_of(read_config(model_path), model_path) is not None
    kind = AutoModelForSeq2SeqLM if has_decoder else AutoModelForCausalLM
    try:
        model = open_pretrained(kind, model_path, dtype=dtype, device_map=device_map).eval()
        if adapter is not None:
            model = adapted_model(model, adapter, model_path).eval()
        kept = [_kept(model, ids_T) for ids_T in probes]
    except failures as error:
        raise EngineError(
            f"transformers cannot run {model_path} for the start-up check: {first_line(error)}"
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
    """Return ids and values of the largest log-probs of every position of one probe.

    An encoder-decoder is given it in both of its halves, and shifts the second one itself.
    """
    probe = torch.from_numpy(ids_T)[None].to(model.device)
    inputs = {"input_ids": probe, "use_cache": False}
    frame = frame_of(model.config)
    if frame is not None:
        text_ids = torch.from_numpy(frame.encoder_ids(ids_T))[None].to(model.device)
        inputs |= {"input_ids": text_ids, "labels": probe}
    logprobs_TV = model(**inputs).logits[0].float().log_softmax(-1)
    logprobs_PK, token_ids_PK = logprobs_TV.topk(min(_NUM_KEPT, logprobs_TV.shape[-1]))
    return token_ids_PK, logprobs_PK


def _key(folders: Sequence[Path], dtype: torch.dtype, made_by: str) -> str:
    """Hash what the reference depends on, by content: other models have these sizes, times."""
    parts = [made_by, str(dtype), str(_PROBE_LENGTHS), str(_NUM_KEPT)]
    for file in (file for folder in folders for file in sorted(folder.glob("*"))):
        if file.suffix in (".safetensors", ".bin", ".json"):
            parts.append(_stamp(file))
    for folder in filter(is_trusted, folders):
        parts += ["own code", *map(_stamp, code_files(folder))]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _stamp(file: Path) -> str:
    return f"{file.name}:{remembered_sha256(file)}"
