"""A head and a loss at the end of a student: the problem, its answer in float64, and how to race.

Dimensions: N = scored positions, V = vocabulary, D = hidden width, K = kept entries.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.bars import at_most
from benchmarks.gpu.card import Card, Times
from benchmarks.gpu.report import Report, gigabytes
from stages.models.causal_lm.chunked_loss import PositionLoss, StudentHead, chunked_loss
from stages.student.losses.cross_entropy import CrossEntropy
from stages.student.losses.kl import Kd, ThresholdTeacher

CHECKED = 2_048  # positions compared with float64: some chunks of everybody's, 20 GB of it
KD_WEIGHT = 0.9  # of the loss "kd", as in the README's recipe
K = 16
# Products of bfloat16, and what sums their rows may be bfloat16 too.
MOST_ERROR = 0.02
LossName = Literal["cross_entropy", "kd", "kl"]  # kd is 0.9 of the KL and 0.1 of cross-entropy


@dataclass(frozen=True, slots=True)
class Problem:
    """What the head reads, the head, and both kinds of targets; hidden states and head are leaves.

    ``weights_NK`` are above 0 and sum to one, ``token_ids_NK`` are distinct within a position.
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    next_token_ids_N: Tensor
    token_ids_NK: Tensor
    weights_NK: Tensor

    @classmethod
    def random(cls, card: Card, shape: tuple[int, int, int], dtype: torch.dtype) -> "Problem":
        """Logits of standard deviation 2."""
        num_positions, width, vocab_size = shape
        generator = torch.Generator(card.device).manual_seed(0)
        place: dict[str, Any] = {"generator": generator, "device": card.device}
        hidden_ND = torch.randn(num_positions, width, **place)
        weight_VD = torch.randn(vocab_size, width, **place).mul_(2 * width**-0.5)
        apart = vocab_size // K
        ids_NK = torch.randint(apart, (num_positions, K), **place)
        return cls(
            hidden_ND=hidden_ND.to(dtype).requires_grad_(),
            weight_VD=weight_VD.to(dtype).requires_grad_(),
            next_token_ids_N=torch.randint(vocab_size, (num_positions,), **place),
            token_ids_NK=ids_NK + apart * torch.arange(K, device=card.device),
            weights_NK=torch.randn(num_positions, K, **place).mul_(2.0).softmax(1),
        )

    def first(self, count: int) -> "Problem":
        """Return the first positions, with the same head."""
        return Problem(
            hidden_ND=self.hidden_ND.detach()[:count].clone().requires_grad_(),
            weight_VD=self.weight_VD,
            next_token_ids_N=self.next_token_ids_N[:count],
            token_ids_NK=self.token_ids_NK[:count],
            weights_NK=self.weights_NK[:count],
        )

    @property
    def entropies_N(self) -> Tensor:
        """Of the weights, in nats: with it a loss is the KL itself."""
        entropies_N: Tensor = torch.special.entr(self.weights_NK).sum(1)
        return entropies_N

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Return those with respect to hidden states and head."""
        return torch.autograd.grad(loss, (self.hidden_ND, self.weight_VD))


@dataclass(frozen=True, slots=True)
class Answer:
    """A mean over positions and its gradients."""

    loss: float
    gradients: tuple[Tensor, ...]


def in_float64(problem: Problem, name: LossName) -> Answer:
    """Return the answer from the definition, all [N, V] at once."""
    hidden_ND, weight_VD = (
        each.detach().double().requires_grad_() for each in (problem.hidden_ND, problem.weight_VD)
    )
    logprobs_NV = (hidden_ND @ weight_VD.T).log_softmax(-1)
    cross_entropy = -logprobs_NV.gather(1, problem.next_token_ids_N[:, None]).mean()
    weights_NK = problem.weights_NK.double()
    kept_NK = logprobs_NV.gather(1, problem.token_ids_NK)
    kl = (weights_NK * (weights_NK.log() - kept_NK)).sum(1).mean()
    share = {"cross_entropy": 0.0, "kd": KD_WEIGHT, "kl": 1.0}[name]
    loss = share * kl + (1 - share) * cross_entropy
    return Answer(float(loss.detach()), torch.autograd.grad(loss, (hidden_ND, weight_VD)))


Loss = Callable[[], Tensor]  # forward, to a mean over positions


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to a loss; ``prepare`` is run outside its time, and raises Unavailable."""

    name: str
    loss: LossName
    prepare: Callable[[Problem], Loss]
    is_ours: bool = False


def ours(name: str, loss: LossName, *, chunk_bytes: int | None = None) -> Candidate:
    """Return ``chunked_loss``, whose products have the dtype of the problem."""

    def prepare(problem: Problem) -> Loss:
        objective = _objective(problem, loss)
        head = StudentHead(problem.weight_VD)
        dtype, count = problem.hidden_ND.dtype, len(problem.hidden_ND)

        def forward() -> Tensor:
            found = chunked_loss(
                problem.hidden_ND, head, objective, dtype=dtype, chunk_bytes=chunk_bytes
            )
            return found.loss / count

        return forward

    return Candidate(name, loss, prepare, is_ours=True)


def _objective(problem: Problem, loss: LossName) -> PositionLoss:
    if loss == "cross_entropy":
        return CrossEntropy(problem.next_token_ids_N)
    teacher = ThresholdTeacher(
        token_ids_NK=problem.token_ids_NK.int(),
        weights_NK=problem.weights_NK,
        num_head_N=torch.full_like(problem.next_token_ids_N, K, dtype=torch.uint8),
        entropies_N=problem.entropies_N,
    )
    return Kd(problem.next_token_ids_N, teacher, KD_WEIGHT if loss == "kd" else 1.0)


class Race:
    """Candidates on one problem: each is checked on a few positions, then measured on all."""

    def __init__(self, report: Report, problem: Problem) -> None:
        """Keep the first positions for the comparison with float64."""
        self.report = report
        self.problem = problem
        self.few = problem.first(min(CHECKED, len(problem.hidden_ND)))
        self.times: dict[str, Times] = {}
        self._answers: dict[LossName, Answer] = {}

    def run(self, candidates: list[Candidate]) -> None:
        """Check and measure one after another."""
        for candidate in candidates:
            self.report.attempt(candidate.name, lambda c=candidate: self._run(c))  # type: ignore[misc]

    def ratio(self, name: str, other: str) -> float | None:
        """Return the time of one over that of another, None where one was not measured."""
        if name not in self.times or other not in self.times:
            return None
        return self.times[name].median / self.times[other].median

    def _run(self, candidate: Candidate) -> None:
        card, report, problem = self.report.card, self.report, self.problem
        errors = self._errors(candidate)
        if candidate.is_ours:
            name = f"{candidate.name}, {len(problem.hidden_ND):,} positions, off float64"
            report.bar(at_most(name, max(errors.values()), MOST_ERROR))
        if not max(errors.values()) <= MOST_ERROR:
            found = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
            raise ArithmeticError(f"not measured, as it is wrong by {found} of float64's")
        held = card.held_bytes()
        forward = candidate.prepare(problem)

        def both() -> object:
            return problem.gradients(forward())

        peak = card.peak_bytes(both)
        self.times[candidate.name] = times = card.timed(both)
        report.row(
            what=candidate.name,
            positions=len(problem.hidden_ND),
            **times.row(),
            **{"GB": gigabytes(None if peak is None else peak - held)},
            **errors,
        )

    def _errors(self, candidate: Candidate) -> Mapping[str, float]:
        """Return relative errors: of the loss, and of both gradients by their norms."""
        if candidate.loss not in self._answers:
            self._answers[candidate.loss] = in_float64(self.few, candidate.loss)
        expected = self._answers[candidate.loss]
        loss = candidate.prepare(self.few)()
        gradients = self.few.gradients(loss)
        errors = {"loss off": abs(float(loss.detach()) / expected.loss - 1)}
        pairs = zip(("hidden", "head"), gradients, expected.gradients, strict=True)
        for name, found, wanted in pairs:
            error = (found.double() - wanted).norm() / wanted.norm()
            errors[f"{name} gradient off"] = float(error)
        return errors
