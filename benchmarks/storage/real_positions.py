"""Real text in three domains, as the teacher and two students see it.

Rows are 512 tokens cut from packed text. Every other row of a source may be measured (as many as
asked for, evenly spaced); students are trained on the rows in between. The *distilled* student is
ten layers of the teacher after a short distillation from the teacher's own full distributions; the
*close* one is the teacher without two of its thirty layers, untrained. Both are made once and kept
in ``<cache>/benchmarks``.

Dimensions: R = rows, T = tokens of a row, D = hidden width, V = vocabulary.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from stages.models.causal_lm.language_head import LanguageHead
from stages.models.engines.engine import open_engine
from stages.models.spec import EngineOptions
from stages.student.init.work import init_student

transformers_logging.disable_progress_bar()

ROW_TOKENS = 512
SOURCES = {
    "web": "c4_demo.jsonl",
    "encyclopaedia": "wiki_demo.txt",
    "chat": "alpaca_en_demo.json",
}
MODEL = "models/smollm2-135m-instruct"
CLOSE_LAYERS = tuple(layer for layer in range(30) if layer not in (10, 20))
_BATCH, _TRAIN_TOKENS, _LR, _WARMUP = 4, 128, 6e-4, 5


@dataclass(frozen=True)
class Seen:
    """What one model makes of the rows: its final hidden states [R, T, D], and its head."""

    hidden_RTD: Tensor
    head: LanguageHead


@dataclass(frozen=True)
class Domain:
    """Rows of one source, apart for measuring and for training students."""

    name: str
    measured_RT: Tensor
    training_RT: Tensor


def load_domains(cache: Path, num_rows: int) -> list[Domain]:
    """Return ``num_rows`` rows to measure of each source, the same for equal arguments."""
    return [load_domain(cache, name, num_rows) for name in SOURCES]


def load_domain(cache: Path, name: str, num_rows: int) -> Domain:
    """Return ``num_rows`` rows to measure of one source."""
    tokenizer = AutoTokenizer.from_pretrained(cache / MODEL, local_files_only=True)
    rows_RT = _packed(_texts(cache / "text" / SOURCES[name], tokenizer), tokenizer)
    to_measure_RT, to_train_RT = rows_RT[0::2], rows_RT[1::2]
    every = len(to_measure_RT) // num_rows
    return Domain(name, to_measure_RT[torch.arange(num_rows) * every], to_train_RT)


def missing_asset(cache: Path) -> str | None:
    """Return a line that names the first asset that is not in the cache, if one is missing."""
    for needed in (cache / MODEL, *(cache / "text" / file for file in SOURCES.values())):
        if not needed.exists():
            return f"{needed} is missing: run `python examples/fetch_assets.py` first"
    return None


def _texts(path: Path, tokenizer: Any) -> list[str]:
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8").splitlines()
    return [_chat(example, tokenizer) for example in json.loads(path.read_text(encoding="utf-8"))]


def _chat(example: Mapping[str, str], tokenizer: Any) -> str:
    asked = "\n\n".join(part for part in (example["instruction"], example["input"]) if part)
    said = {"user": asked, "assistant": example["output"]}
    turns = [{"role": role, "content": content} for role, content in said.items()]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def _packed(texts: Sequence[str], tokenizer: Any) -> Tensor:
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    num_rows = len(ids) // ROW_TOKENS
    return torch.tensor(ids[: num_rows * ROW_TOKENS]).reshape(num_rows, ROW_TOKENS)


def see(model: Path, rows_RT: Tensor, cache: Path) -> Seen:
    """Run a model over the rows with the product's transformers engine, in float32."""
    options = EngineOptions(
        device="cpu",
        max_num_batched_tokens=8 * ROW_TOKENS,
        cache_dir=cache / "benchmarks" / "head_check",
    )
    with open_engine("transformers", model, dtype="float32", options=options) as engine:
        hidden_RTD = torch.stack(list(engine.hidden_states(list(rows_RT.numpy()))))
        return Seen(hidden_RTD, engine.head)


def distilled_student(cache: Path, domains: Sequence[Domain], num_steps: int) -> Path:
    """Return the folder of the ten-layer student after ``num_steps``, training it if need be."""
    folder = cache / "benchmarks" / f"student-10-layers-{num_steps}-steps"
    if not (folder / "config.json").is_file():
        print(f"training the student for {num_steps} steps, once: {folder}", flush=True)
        working = folder.with_name(folder.name + ".partial")
        shutil.rmtree(working, ignore_errors=True)
        init_student(cache / MODEL, working, 10)
        model = _distil(cache / MODEL, working, domains, num_steps)
        model.save_pretrained(working)
        shutil.rmtree(folder, ignore_errors=True)
        working.rename(folder)
    return folder


def close_student(cache: Path) -> Path:
    """Return the folder of the teacher without two of its layers."""
    folder = cache / "benchmarks" / "student-28-layers"
    init_student(cache / MODEL, folder, CLOSE_LAYERS)
    return folder


def _distil(teacher: Path, student: Path, domains: Sequence[Domain], num_steps: int) -> Any:
    """Train on KL(teacher || student) over full distributions, a teacher beside it."""
    torch.manual_seed(0)
    loaded = {"dtype": torch.float32, "local_files_only": True}
    source = AutoModelForCausalLM.from_pretrained(teacher, **loaded).eval()
    model = AutoModelForCausalLM.from_pretrained(student, **loaded).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR)
    draw, started = np.random.default_rng(0), time.perf_counter()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = _LR * min(1.0, (step + 1) / _WARMUP)
        ids_BT = _training_batch(domains, draw)
        with torch.no_grad():
            probs_BTV = source(ids_BT, use_cache=False).logits.softmax(-1)
        logprobs_BTV = model(ids_BT, use_cache=False).logits.log_softmax(-1)
        loss = -(probs_BTV * logprobs_BTV).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            seconds = time.perf_counter() - started
            print(f"  step {step + 1}: loss {loss.item():.2f}, {seconds:.0f} s", flush=True)
    return model


def _training_batch(domains: Sequence[Domain], draw: np.random.Generator) -> Tensor:
    rows = []
    for _ in range(_BATCH):
        training_RT = domains[int(draw.integers(len(domains)))].training_RT
        start = int(draw.integers(ROW_TOKENS - _TRAIN_TOKENS))
        row_T = training_RT[int(draw.integers(len(training_RT)))]
        rows.append(row_T[start : start + _TRAIN_TOKENS])
    return torch.stack(rows)
