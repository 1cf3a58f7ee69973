"""What answering one query costs a reader after vectors, and after demonstrations as text.

Operations are counted by formula, two for a multiplication with its addition. With L layers, width
D, H heads of width E and G of keys and values, a gated MLP of width F and a vocabulary of V, a pass
over T tokens, of which the last Q are new, gives the logits of one position for

    L Q (2 D (H + 2 G) E + 2 H E D + 6 D F)  +  4 L Q T H E  +  2 D V

that is projections and MLP, attention over the full square (as torch's own counter has it; a
kernel that leaves out what is masked has half), and the head. Norms, rotations and softmax are left
out. Vectors are Q = T = M + the query's tokens, text the demonstrations' and the query's.

Times are those of a forward in float32, batch 1, logits of the last position. ``text, kept`` is the
query alone after demonstrations whose keys and values are still there (prefix caching).

Dimensions: T = tokens, M = vectors, R = the reader's width.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from schemas.dataset import open_dataset
from stages.student.distiller.distiller import load_distiller
from stages.student.distiller.reader import load_reader

CPU = torch.device("cpu")
TEXT, KEPT, VECTORS, MAKING = "text", "text, kept", "vectors", "making the vectors"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryJob:
    """``counts`` of demonstrations, of ``one`` tokens each, before a query of ``query`` tokens."""

    reader: str
    distiller: str
    asked: str
    counts: Sequence[int]
    one: float
    query: int
    rounds: int

    def as_json(self) -> str:
        """Return what the process is started with."""
        return json.dumps(asdict(self))


def pass_flops(config: Any, length: int, *, new: int | None = None, head: bool = True) -> int:
    """Return the operations of a forward over ``length`` tokens, of which ``new`` are computed."""
    computed = length if new is None else new
    width, layers = config.hidden_size, config.num_hidden_layers
    per_head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    inner, shared = (
        count * per_head for count in (config.num_attention_heads, config.num_key_value_heads)
    )
    linear = 2 * width * (inner + 2 * shared) + 2 * inner * width
    linear += 6 * width * config.intermediate_size
    body = layers * computed * (linear + 4 * length * inner)
    return int(body + (2 * width * config.vocab_size if head else 0))


def counted_flops(forward: Callable[[], Any]) -> int:
    """Return what torch counts, with attention as plain products that its counter knows."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    return int(counter.get_total_flops())


def answered(reader: Any, inputs_TR: Tensor, past: Any = None) -> Any:
    """Run a reader over embeddings; gives the last position's logits."""
    return reader(
        inputs_embeds=inputs_TR[None],
        past_key_values=past,
        use_cache=past is not None,
        logits_to_keep=1,
    )


@dataclass(frozen=True, slots=True)
class Models:
    """The reader, the distiller, and the text [T] that stands for all demonstrations and query."""

    reader: Any
    distiller: Any
    ids_T: Tensor
    num_query: int

    def ways(self, length: int) -> dict[str, tuple[Callable[[], Any], int]]:
        """Return each way to answer after ``length`` tokens of demonstrations, and its count."""
        reader, distiller = self.reader, self.distiller
        config, small = reader.config, distiller.config.text_config
        num_vectors = distiller.config.num_vectors
        embedded_TR = reader.get_input_embeddings()(self.ids_T)
        before_TR, query_QR = embedded_TR[:length], embedded_TR[-self.num_query :]
        text_TR = torch.cat([before_TR, query_QR])
        shown = self.ids_T[None, : max(length, 1)], torch.tensor([length])
        fed_TR = torch.cat([distiller(*shown)[0], query_QR])
        past = DynamicCache(config=config)
        if length:
            answered(reader, before_TR, past)
        kept = pass_flops(config, len(text_TR), new=self.num_query)
        made = pass_flops(small, length + num_vectors, head=False)
        return {
            TEXT: (lambda: answered(reader, text_TR), pass_flops(config, len(text_TR))),
            VECTORS: (lambda: answered(reader, fed_TR), pass_flops(config, len(fed_TR))),
            KEPT: (lambda: answered(reader, query_QR, past), kept),
            MAKING: (lambda: distiller(*shown), made),
        }


@torch.inference_mode()
def run_job(job: QueryJob) -> dict[str, Any]:
    """Measure every count in every round, all ways one after another."""
    reader = load_reader(Path(job.reader), device=CPU, dtype=torch.float32)
    distiller = load_distiller(Path(job.distiller), device=CPU).eval()
    rows = open_dataset([job.asked], split="train", verify=False)
    text_T = np.concatenate([rows[index]["input_ids_T"] for index in range(len(rows))])
    longest = round(max(job.counts) * job.one)
    ids_T = torch.from_numpy(text_T[: longest + job.query].astype(np.int64))
    models = Models(reader, distiller, ids_T, job.query)
    found: dict[str, Any] = {"flops": {}, "wall": {}, "cpu": {}}
    for _ in range(job.rounds):
        for count in job.counts:
            for name, (forward, flops) in models.ways(round(count * job.one)).items():
                wall, cpu = time.perf_counter(), time.process_time()
                forward()
                key = f"{name}/{count}"
                found["wall"].setdefault(key, []).append(time.perf_counter() - wall)
                found["cpu"].setdefault(key, []).append(time.process_time() - cpu)
                found["flops"][key] = flops
    query_QR = reader.get_input_embeddings()(ids_T[-job.query :])
    return found | {"check": _check(reader, query_QR)}


def _check(reader: Any, query_QR: Tensor) -> dict[str, int]:
    by_torch = counted_flops(lambda: answered(reader, query_QR))
    return {"by_torch": by_torch, "by_formula": pass_flops(reader.config, len(query_QR))}


if __name__ == "__main__":
    answer = run_job(QueryJob(**json.loads(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(answer))
