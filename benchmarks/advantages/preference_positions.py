"""Real prompts with a student's own responses, an aligned teacher and the teacher it came from.

No aligned teacher of this size comes with the assets, so one is made: SmolLM2-135M-Instruct after a
few dozen steps of DPO (arXiv 2305.18290, equation 7) on real preference pairs; the model without
them is the reference. The student is the reference without four of its thirty layers, after a
short distillation from it on the chosen responses; it answers greedily, as ADPA's students do. All
is made once, from fixed seeds, and kept in ``<cache>/benchmarks``. Prompts to measure on are those
of pairs that nobody was trained on.

Dimensions: B = sequences of a batch, T = tokens, P = response positions, V = vocabulary.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from stages.student.init.work import init_student

transformers_logging.disable_progress_bar()

PAIRS = "text/dpo_en_demo.json"
MODEL = "models/smollm2-135m-instruct"
DPO_STEPS, KD_STEPS = 24, 16
DPO_BETA = 0.1
_KEPT_LAYERS = tuple(layer for layer in range(30) if layer not in (10, 14, 18, 22))
_DPO_LR, _KD_LR, _DPO_PAIRS, _KD_ROWS = 1e-5, 3e-4, 2, 2
_LONGEST_PROMPT, _LONGEST_RESPONSE = 128, 160
_NUM_TRAINING = 200  # pairs; the others are measured on

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """A prompt up to where the assistant speaks, and two responses to it."""

    prompt_T: Ids
    chosen_T: Ids
    rejected_T: Ids


def missing_asset(cache: Path) -> str | None:
    """Return a line that names the first asset that is not in the cache, if one is missing."""
    for needed in (cache / MODEL, cache / PAIRS):
        if not needed.exists():
            return f"{needed} is missing: run `python examples/fetch_assets.py` first"
    return None


def read_pairs(cache: Path) -> tuple[list[Pair], list[Pair]]:
    """Return pairs to train on and pairs to measure on, with prompts of a moderate length."""
    tokenizer = AutoTokenizer.from_pretrained(cache / MODEL, local_files_only=True)
    examples = json.loads((cache / PAIRS).read_text(encoding="utf-8"))
    training = [_pair(example, tokenizer) for example in examples[:_NUM_TRAINING]]
    measured = [_pair(example, tokenizer) for example in examples[_NUM_TRAINING:]]
    return _of_moderate_length(training), _of_moderate_length(measured)


def _pair(example: dict[str, Any], tokenizer: Any) -> Pair:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = [
        {"role": roles[turn["from"]], "content": turn["value"]} for turn in example["conversations"]
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    answers = [example[side]["value"] + tokenizer.eos_token for side in ("chosen", "rejected")]
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, *answers)]
    prompt_T, chosen_T, rejected_T = (np.asarray(part, np.int64) for part in ids)
    return Pair(prompt_T, chosen_T[:_LONGEST_RESPONSE], rejected_T[:_LONGEST_RESPONSE])


def _of_moderate_length(pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in pairs if len(pair.prompt_T) <= _LONGEST_PROMPT]


def aligned_teacher(cache: Path, pairs: Sequence[Pair]) -> Path:
    """Return the folder of the teacher after DPO on ``pairs``, training it if need be."""
    folder = cache / "benchmarks" / f"dpo-teacher-{DPO_STEPS}-steps"
    return _made_once(folder, lambda working: _align(cache / MODEL, working, pairs))


def distilled_student(cache: Path, pairs: Sequence[Pair]) -> Path:
    """Return the folder of the student, training it if need be."""
    folder = cache / "benchmarks" / f"student-26-layers-{KD_STEPS}-steps"
    return _made_once(folder, lambda working: _distil(cache / MODEL, working, pairs))


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    if not (folder / "config.json").is_file():
        print(f"making, once: {folder}", flush=True)
        working = folder.with_name(folder.name + ".partial")
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        make(working)
        shutil.rmtree(folder, ignore_errors=True)
        working.rename(folder)
    return folder


def _align(teacher: Path, working: Path, pairs: Sequence[Pair]) -> None:
    """Take ``DPO_STEPS`` steps of DPO from the teacher, itself the reference."""
    torch.manual_seed(0)
    reference, model = load_model(teacher), load_model(teacher).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_DPO_LR, weight_decay=0.0)
    draw, started = np.random.default_rng(0), time.perf_counter()
    for step in range(DPO_STEPS):
        batch = [pairs[int(index)] for index in draw.integers(len(pairs), size=_DPO_PAIRS)]
        sides = [(p.prompt_T, side) for p in batch for side in (p.chosen_T, p.rejected_T)]
        with torch.no_grad():
            reference_B = _sums_of_logprobs(reference, sides)
        ratios_B2 = (_sums_of_logprobs(model, sides) - reference_B).view(-1, 2)
        loss = -functional.logsigmoid(DPO_BETA * (ratios_B2[:, 0] - ratios_B2[:, 1])).mean()
        _step(optimizer, model, loss)
        _tell(step, loss, started)
    AutoTokenizer.from_pretrained(teacher, local_files_only=True).save_pretrained(working)
    model.save_pretrained(working)


def _distil(teacher: Path, working: Path, pairs: Sequence[Pair]) -> None:
    """Take ``KD_STEPS`` steps on KL(teacher || student) over the chosen responses."""
    torch.manual_seed(0)
    working.rmdir()
    init_student(teacher, working, _KEPT_LAYERS)
    source, model = load_model(teacher), load_model(working).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_KD_LR)
    draw, started = np.random.default_rng(0), time.perf_counter()
    for step in range(KD_STEPS):
        batch = [pairs[int(index)] for index in draw.integers(len(pairs), size=_KD_ROWS)]
        input_ids_BT, is_response_BT = _padded([(p.prompt_T, p.chosen_T) for p in batch])
        inputs_BT, counted_BT = input_ids_BT[:, :-1], is_response_BT[:, 1:]
        with torch.no_grad():
            probs_PV = source(inputs_BT, use_cache=False).logits[counted_BT].softmax(-1)
        logprobs_PV = model(inputs_BT, use_cache=False).logits[counted_BT].log_softmax(-1)
        loss = -(probs_PV * logprobs_PV).sum(-1).mean()
        _step(optimizer, model, loss)
        _tell(step, loss, started)
    model.save_pretrained(working)


def _step(optimizer: torch.optim.Optimizer, model: Any, loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _tell(step: int, loss: Tensor, started: float) -> None:
    if (step + 1) % 8 == 0:
        seconds = time.perf_counter() - started
        print(f"  step {step + 1}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)


def _sums_of_logprobs(model: Any, sides: Sequence[tuple[Ids, Ids]]) -> Tensor:
    """Return [B] sums of log p over the tokens of each response."""
    input_ids_BT, is_response_BT = _padded(sides)
    logits_BTV: Tensor = model(input_ids_BT[:, :-1], use_cache=False).logits
    logprobs_BTV = logits_BTV.log_softmax(-1)
    logprobs_BT = logprobs_BTV.gather(2, input_ids_BT[:, 1:, None])[:, :, 0]
    return (logprobs_BT * is_response_BT[:, 1:]).sum(1)


def _padded(sides: Sequence[tuple[Ids, Ids]]) -> tuple[Tensor, Tensor]:
    """Return [B, T] ids padded on the right, and which of them are of the response."""
    width = max(len(prompt_T) + len(response_T) for prompt_T, response_T in sides)
    input_ids_BT = torch.zeros(len(sides), width, dtype=torch.long)
    is_response_BT = torch.zeros(len(sides), width, dtype=torch.bool)
    for b, (prompt_T, response_T) in enumerate(sides):
        end = len(prompt_T) + len(response_T)
        input_ids_BT[b, :end] = torch.from_numpy(np.concatenate([prompt_T, response_T]))
        is_response_BT[b, len(prompt_T) : end] = True
    return input_ids_BT, is_response_BT


def load_model(folder: Path) -> Any:
    """Load a model in float32 on the CPU, without gradients of its own yet in the way."""
    loaded = {"dtype": torch.float32, "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(folder, **loaded).eval()


def cached_responses(
    cache: Path, student: Path, prompts: Sequence[Ids], num_tokens: int
) -> list[Ids]:
    """Return what the student answers to each prompt, generating it if need be."""
    name = f"{student.name}-{len(prompts)}-answers-of-{num_tokens}.json"
    file = cache / "benchmarks" / name
    if not file.is_file():
        print(f"generating, once: {file}", flush=True)
        responses = greedy_responses(student, prompts, num_tokens)
        file.write_text(json.dumps([response.tolist() for response in responses]))
    return [np.asarray(ids, np.int64) for ids in json.loads(file.read_text())]


@torch.no_grad()
def greedy_responses(student: Path, prompts: Sequence[Ids], num_tokens: int) -> list[Ids]:
    """Return what the student answers, up to ``num_tokens`` or its stop token, which is kept."""
    model = load_model(student)
    stop = model.generation_config.eos_token_id
    width = max(map(len, prompts))
    input_ids_BT = torch.full((len(prompts), width), stop)
    mask_BT = torch.zeros_like(input_ids_BT)
    for b, prompt_T in enumerate(prompts):
        input_ids_BT[b, width - len(prompt_T) :] = torch.from_numpy(prompt_T)
        mask_BT[b, width - len(prompt_T) :] = 1
    written_BT = model.generate(
        input_ids=input_ids_BT, attention_mask=mask_BT, max_new_tokens=num_tokens, do_sample=False
    )[:, width:].numpy()
    ends = [np.flatnonzero(ids == stop) for ids in written_BT]
    return [
        ids[: int(end[0]) + 1] if len(end) else ids
        for ids, end in zip(written_BT, ends, strict=True)
    ]
