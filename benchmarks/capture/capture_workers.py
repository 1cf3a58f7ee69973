"""The two engines of ``capture.py``, each in a process of its own, run one way at a time on demand.

Both processes stay alive, so that ways of both can be measured in turns; one that waits takes no
processor time. Times are of one pass over all prompts: wall, processor time of all threads, and the
peak of resident memory, which is reset before each pass.

Dimensions: T = tokens, D = hidden width.
"""

import gc
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from schemas.sample_id import sample_id_of
from schemas.storage.shards import write_shard
from schemas.tables.documents import DOCUMENTS, Document
from stages.models.engines.engine import Engine, open_engine
from stages.models.spec import EngineOptions
from stages.signals.scoring.logits import LogitBlocks
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.signals.teacher_logits.work import score_shard

Way = Callable[[], None]
PLAIN, DICTS, FLAT = "plain prefill", "prompt_logprobs=64, dicts", "prompt_logprobs=64, flat"
FLAT_IDS = "prompt_logprobs=64, flat, no text"
HIDDEN, HEAD, OURS = "ours: T0 hidden states", "ours: T1 + head", "ours: T2 + encode, write, fsync"

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "KMP_BLOCKTIME": "0",
}


@dataclass(frozen=True)
class Task:
    """What both engines are given: model, prompts [R, T], the same settings, where to write."""

    model: Path
    prompts_RT: npt.NDArray[np.int64]
    options: EngineOptions
    folder: Path
    k: int


@dataclass(frozen=True)
class Pass:
    """One pass over all prompts."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    grown_mb: float


class Worker:
    """A child process that holds one engine."""

    def __init__(self, ways: Callable[[Task], Any], task: Task) -> None:
        """Start it; ``ways`` is a context manager that yields the engine's ways by name."""
        self.connection, other = get_context("spawn").Pipe()
        arguments = (other, ways, task)
        self.process = get_context("spawn").Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        other.close()

    def wait_until_ready(self) -> None:
        """Return when the engine is loaded and every way has run once on one prompt."""
        assert self.connection.recv() == "ready"

    def run(self, way: str) -> Pass:
        """Run one pass; raises EOFError if the process died (it has printed why)."""
        self.connection.send(way)
        result = self.connection.recv()
        assert isinstance(result, Pass)
        return result

    def close(self) -> None:
        """Let the process end."""
        if self.process.is_alive():
            self.connection.send(None)
            self.process.join(60)
        self.process.terminate()


def _serve(connection: Connection, ways: Callable[[Task], Any], task: Task) -> None:
    os.environ.update(ENVIRONMENT)
    with ways(task) as by_name:
        connection.send("ready")
        while (name := connection.recv()) is not None:
            connection.send(_measure(by_name[name]))


def _measure(way: Way) -> Pass:
    gc.collect()
    before = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    cpu, wall = time.process_time(), time.perf_counter()
    way()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = memory_mb("VmHWM")
    return Pass(wall, cpu, peak, peak - before)


def memory_mb(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1000


@contextmanager
def generating(task: Task) -> Iterator[dict[str, Way]]:
    """vLLM's generate runner, as anybody would ask it for log-probs."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(task.model),
        dtype="float32",
        max_logprobs=64,
        kv_cache_memory_bytes=task.options.kv_cache_memory_bytes,
        max_model_len=task.options.max_model_len,
        max_num_batched_tokens=task.options.max_num_batched_tokens,
        enforce_eager=task.options.enforce_eager,
        enable_prefix_caching=False,
        use_tqdm_on_load=False,
    )
    plain = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
    asked: dict[str, dict[str, Any]] = {
        PLAIN: plain,
        DICTS: plain | {"prompt_logprobs": 64, "detokenize": True},
        FLAT: plain | {"prompt_logprobs": 64, "detokenize": True, "flat_logprobs": True},
        FLAT_IDS: plain | {"prompt_logprobs": 64, "flat_logprobs": True},
    }
    prompts = [{"prompt_token_ids": ids_T.tolist()} for ids_T in task.prompts_RT]

    def way(fields: dict[str, Any], count: int | None) -> Way:
        params = SamplingParams(**fields)
        return lambda: _check(llm.generate(prompts[:count], params, use_tqdm=False), fields)

    for fields in asked.values():
        way(fields, 1)()
    yield {name: way(fields, None) for name, fields in asked.items()}
    llm.llm_engine.engine_core.shutdown()


def _check(outputs: list[Any], fields: dict[str, Any]) -> None:
    """Every position but the first has its log-probs, or none was asked for."""
    for output in outputs:
        found = output.prompt_logprobs
        if "prompt_logprobs" in fields:
            assert len(found) == len(output.prompt_token_ids) and len(found[1]) >= 64
        else:
            assert found is None


@contextmanager
def capturing(task: Task) -> Iterator[dict[str, Way]]:
    """The product's path, whole and cut short after each of its steps."""
    with open_engine("vllm", task.model, dtype="float32", options=task.options) as engine:
        for way in capture_ways(engine, task, 1).values():
            way()
        yield capture_ways(engine, task, None)


def capture_ways(engine: Engine, task: Task, count: int | None) -> dict[str, Way]:
    sequences = list(task.prompts_RT[:count])
    fields = {"stage": "teacher_logits", "input": "-", "model": "-"}
    stage = TeacherLogitsStage.model_validate(
        fields | {"encoding": {"kind": "threshold", "k": task.k}}
    )
    rows = [
        Document(sample_id=sample_id_of(ids), split="train", input_ids_T=ids) for ids in sequences
    ]
    batch = DOCUMENTS.bind(vocab_size=engine.head.vocab_size).to_batch(rows)
    documents = pa.Table.from_batches([batch])
    bound = stage.table.bind(vocab_size=engine.head.vocab_size, sizes={"K": task.k})

    def hidden() -> None:
        for hidden_TD in engine.hidden_states(sequences):
            assert hidden_TD.dtype == torch.float32

    def head() -> None:
        blocks = LogitBlocks(engine.head)
        for hidden_TD in engine.hidden_states(sequences):
            for _ in blocks.of(hidden_TD[:-1]):
                pass

    def ours() -> None:
        file = task.folder / "shard.arrow"
        written = write_shard(file, bound, score_shard(stage, engine, documents))
        assert written.num_rows == len(sequences)

    return {HIDDEN: hidden, HEAD: head, OURS: ours}
