"""The encoding of a teacher's logits against the time to read them once.

``threshold``, k = 16, of [P, V] logits that lie on the device, in blocks of positions as
``teacher_logits`` takes them, up to what is then copied to the host. bfloat16 logits are widened a
block at a time. One read is the bytes of the logits over the device's measured bandwidth; "reads,
counted" are the bytes that the operations pass over, in the same unit, which need no GPU.

Dimensions: P = positions, V = vocabulary, K = kept entries.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.bars import at_most
from benchmarks.gpu.card import Card
from benchmarks.gpu.moved_bytes import moved_bytes
from benchmarks.gpu.report import Report, gigabytes
from stages.signals.scoring.encoding import (
    MAX_BLOCK_BYTES,
    ThresholdSample,
    measure,
    threshold_sample,
)

PART = "encoding"
FULL, QUICK = (8_192, 151_936), (48, 4_096)
K = 16
CHECKED = 64  # positions compared with float64
MOST_READS = 3.0
MOST_ERROR = 1e-4  # nats, of log-probs and entropies
NEAR = 1e-4  # a probability this close to the threshold may fall on either side
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Teacher:
    """Logits [P, V], the tokens that came next, and a uniform for each position."""

    logits_PV: Tensor
    next_token_ids_P: Tensor
    offsets_P: Tensor

    @classmethod
    def random(cls, card: Card, shape: tuple[int, int], dtype: torch.dtype) -> "Teacher":
        """Normal logits of standard deviation 3: a few large ones and a long tail."""
        generator = torch.Generator(card.device).manual_seed(0)
        place: dict[str, Any] = {"generator": generator, "device": card.device}
        logits_PV = torch.empty(shape, dtype=dtype, device=card.device)
        for start in range(0, shape[0], 512):
            rows_PV = logits_PV[start : start + 512]
            rows_PV.copy_(torch.randn(rows_PV.shape, **place).mul_(3.0))
        next_token_ids_P = torch.randint(shape[1], shape[:1], **place)
        return cls(logits_PV, next_token_ids_P, torch.rand(shape[0], **place))

    def first(self, count: int) -> "Teacher":
        """Return a copy of the first positions."""
        arrays = (self.logits_PV, self.next_token_ids_P, self.offsets_P)
        return Teacher(*(array[:count].clone() for array in arrays))


@dataclass(frozen=True, slots=True)
class Encoded:
    """One block as it is copied to the host."""

    sample: ThresholdSample
    next_token_logprobs_P: Tensor
    entropies_P: Tensor


def encoded(teacher: Teacher) -> Iterator[Encoded]:
    """Encode block by block; float32 logits are overwritten."""
    num_positions, vocab_size = teacher.logits_PV.shape
    size = max(1, MAX_BLOCK_BYTES // (4 * vocab_size))
    for start in range(0, num_positions, size):
        rows = slice(start, start + size)
        logits_PV = teacher.logits_PV[rows].float()
        measured = measure(logits_PV, teacher.next_token_ids_P[rows])
        assert measured.finite  # the stage asks, too, and the device has to answer
        sample = threshold_sample(measured, teacher.offsets_P[rows], k=K)
        yield Encoded(sample, measured.next_token_logprobs_P, measured.entropies_P)


def run(report: Report, *, quick: bool) -> None:
    """Check and measure both dtypes."""
    shape = QUICK if quick else FULL
    bandwidths: list[float] = []

    def find_bandwidth() -> None:
        bandwidths.append(report.card.bandwidth(min(4 << 30, 4 * shape[0] * shape[1])))
        report.row(what="bandwidth", **{"GB/s": bandwidths[0] / 1e9})

    report.attempt("bandwidth", find_bandwidth)
    for dtype in DTYPES if bandwidths else ():
        name = str(dtype).removeprefix("torch.")
        report.attempt(name, lambda d=dtype: _measure(report, shape, d, bandwidths[0]))  # type: ignore[misc]


def _measure(report: Report, shape: tuple[int, int], dtype: torch.dtype, bandwidth: float) -> None:
    name = str(dtype).removeprefix("torch.")
    teacher = Teacher.random(report.card, shape, dtype)
    error = error_against_float64(teacher.first(min(CHECKED, shape[0])))
    report.bar(at_most(f"{name}, nats off float64", error, MOST_ERROR))
    few = teacher.first(min(CHECKED, shape[0]))
    reads_counted = moved_bytes(lambda: list(encoded(few))) / few.logits_PV.nbytes
    kept_PV = teacher.logits_PV.clone() if dtype == torch.float32 else None

    def refill() -> None:
        if kept_PV is not None:  # float32 logits are overwritten
            teacher.logits_PV.copy_(kept_PV)

    held = report.card.held_bytes()
    peak = report.card.peak_bytes(lambda: list(encoded(teacher)))
    times = report.card.timed(lambda: list(encoded(teacher)), before=refill)
    once = teacher.logits_PV.nbytes / bandwidth
    report.row(
        what=f"threshold of {name}",
        **times.row(),
        **{
            "one read, ms": 1e3 * once,
            "reads": times.median / once,
            "reads, counted": reads_counted,
            "GB beside the logits": gigabytes(None if peak is None else peak - held),
        },
    )
    if report.card.is_gpu:
        report.bar(at_most(f"{name}, reads", times.median / once, MOST_READS))


def error_against_float64(teacher: Teacher) -> float:
    """Return the largest error of log-probs and entropies, in nats.

    Raises AssertionError for a head that is not the definition's, or a draw from the tail that does
    not lie where its uniform falls.
    """
    logprobs_PV = teacher.logits_PV.double().log_softmax(-1)
    probs_PV = logprobs_PV.exp()
    found = list(encoded(teacher))
    entropies_P = torch.cat([each.entropies_P for each in found]).double()
    next_P = torch.cat([each.next_token_logprobs_P for each in found]).double()
    expected_P = logprobs_PV.gather(1, teacher.next_token_ids_P[:, None])[:, 0]
    off_P = torch.maximum(
        (entropies_P + (probs_PV * logprobs_PV).sum(1)).abs(), (next_P - expected_P).abs()
    )
    ids_PK = torch.cat([each.sample.token_ids_PK for each in found])
    num_head_P = torch.cat([each.sample.num_head_P for each in found])
    _check_head(probs_PV, ids_PK, num_head_P)
    _check_tail(probs_PV, ids_PK, num_head_P, teacher.offsets_P)
    return float(off_P.max())


def _check_head(probs_PV: Tensor, ids_PK: Tensor, num_head_P: Tensor) -> None:
    """The head is every p of at least tau, the number at which ``min(1, p / tau)`` adds up to K."""
    top_PK = probs_PV.topk(K).values
    left_PK = 1.0 - top_PK.cumsum(1) + top_PK  # the mass of an entry and of all below it
    ratio_PK = top_PK * (K - torch.arange(K, device=top_PK.device)) / left_PK
    is_clear_P = ((ratio_PK - 1).abs() > NEAR).all(1)
    expected_P = (ratio_PK >= 1).cumprod(1).sum(1)
    assert bool((num_head_P == expected_P)[is_clear_P].all()), "a head of another size"
    in_head_PK = torch.arange(K, device=top_PK.device) < num_head_P[:, None]
    head_PK = probs_PV.gather(1, ids_PK)
    assert bool((head_PK == top_PK)[in_head_PK].all()), "a head that is not the likeliest tokens"


def _check_tail(probs_PV: Tensor, ids_PK: Tensor, num_head_P: Tensor, offsets_P: Tensor) -> None:
    """Draw i is the token in whose share of the running mass point ``offset + i`` lies."""
    entry_K = torch.arange(K, device=ids_PK.device)
    in_head_PK = entry_K < num_head_P[:, None]
    vocab_size = probs_PV.shape[1]
    mass_PV = torch.nn.functional.pad(probs_PV, (0, 1))  # an entry more, which is put away again
    mass_PV.scatter_(1, torch.where(in_head_PK, ids_PK, vocab_size), 0.0)
    mass_PV = mass_PV[:, :vocab_size]
    ends_PV = mass_PV.cumsum(1)
    total_P1 = ends_PV[:, -1:]
    share_P1 = total_P1 / (K - num_head_P[:, None]).clamp(min=1)
    points_PK = (offsets_P[:, None] + entry_K - num_head_P[:, None]) * share_P1
    ends_PK, mass_PK = ends_PV.gather(1, ids_PK), mass_PV.gather(1, ids_PK)
    room_P1 = 1e-5 * total_P1
    inside_PK = (points_PK <= ends_PK + room_P1) & (points_PK >= ends_PK - mass_PK - room_P1)
    assert bool(inside_PK[~in_head_PK].all()), "a draw that is not where its uniform falls"
