"""The fused head and loss against plain autograd on dense [N, V] float64, and finite differences.

Dimensions: N = positions, V = vocabulary, D = hidden width, K = kept entries.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.models.causal_lm import chunked_loss as losses_module
from stages.models.causal_lm.chunked_loss import (
    LossSums,
    PositionLoss,
    StudentHead,
    chunked_loss,
    logits_loss,
)
from stages.models.causal_lm.language_head import LanguageHead
from stages.student.losses.cross_entropy import CrossEntropy
from stages.student.losses.kl import ExactTeacher, Kd, Teacher, ThresholdTeacher, TopKTeacher

N, V, D, K = 13, 101, 7, 5
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.37},
    "softcap": {"softcap": 3.0},
    "everything": {"bias": True, "scale": 1.7, "softcap": 2.5},
}


@dataclass
class Case:
    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None
    next_N: Tensor
    probs_NV: Tensor  # the teacher, dense

    @property
    def head(self) -> StudentHead:
        return StudentHead(self.weight_VD, self.bias_V, self.scale, self.softcap)

    @property
    def parameters(self) -> list[Tensor]:
        tensors = [self.hidden_ND, self.weight_VD, self.bias_V]
        return [tensor for tensor in tensors if tensor is not None]

    def log_softmax(self) -> Tensor:
        """The obvious way, all [N, V] at once."""
        logits_NV = self.hidden_ND @ self.weight_VD.T
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V
        logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV.log_softmax(-1)


def make_case(
    num_positions: int = N,
    *,
    vocab_size: int = V,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Case:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Case(
        hidden_ND=normal(num_positions, D).requires_grad_(),
        weight_VD=normal(vocab_size, D).requires_grad_(),
        bias_V=normal(vocab_size).requires_grad_() if bias else None,
        scale=scale,
        softcap=softcap,
        next_N=torch.randint(vocab_size, (num_positions,), generator=generator),
        probs_NV=(2 * normal(num_positions, vocab_size)).softmax(-1),
    )


def threshold(case: Case) -> ThresholdTeacher:
    """Any weights that sum to one; the same token twice at every position."""
    weights_NK, ids_NK = case.probs_NV.topk(K)
    ids_NK[:, -1] = ids_NK[:, -2]
    return ThresholdTeacher(
        token_ids_NK=ids_NK.int(),
        weights_NK=weights_NK / weights_NK.sum(1, keepdim=True),
        num_head_N=torch.full((len(ids_NK),), K, dtype=torch.uint8),
        entropies_N=-torch.xlogy(case.probs_NV, case.probs_NV).sum(1),
    )


def top_k(case: Case) -> TopKTeacher:
    probs_NK, ids_NK = case.probs_NV.topk(K)
    return TopKTeacher(ids_NK.int(), probs_NK, 1 - probs_NK.sum(1))


def exact(case: Case) -> ExactTeacher:
    """A head whose logits are log p: hidden state = one-hot of the position."""
    head = LanguageHead(
        weight_VD=case.probs_NV.log().T.contiguous(),
        bias_V=None,
        scale=1.0,
        softcap=None,
        dtype=torch.float64,
    )
    entropies_N = -torch.xlogy(case.probs_NV, case.probs_NV).sum(1)
    return ExactTeacher(torch.eye(len(case.probs_NV), dtype=torch.float64), entropies_N, head)


TEACHERS: dict[str, Callable[[Case], Teacher]] = {
    "threshold": threshold,
    "top_k": top_k,
    "exact": exact,
}


def reference_kl(case: Case, teacher: Teacher) -> Tensor:
    """[N] from the definition, with nothing shared."""
    logprobs_NV = case.log_softmax()
    if isinstance(teacher, ThresholdTeacher):
        dense_NV = torch.zeros_like(case.probs_NV)
        dense_NV.scatter_add_(1, teacher.token_ids_NK.long(), teacher.weights_NK)
        return -(dense_NV * logprobs_NV).sum(1) - teacher.entropies_N
    if isinstance(teacher, TopKTeacher):
        kept_NV = torch.zeros_like(case.probs_NV, dtype=torch.bool)
        kept_NV.scatter_(1, teacher.token_ids_NK.long(), True)
        p_NV, s_NV = case.probs_NV, logprobs_NV.exp()
        p_rest_N, s_rest_N = (p_NV * ~kept_NV).sum(1), (s_NV * ~kept_NV).sum(1)
        inside_NV = torch.where(kept_NV, p_NV * (p_NV.log() - logprobs_NV), 0.0)
        return inside_NV.sum(1) + p_rest_N * (p_rest_N.log() - s_rest_N.log())
    return (case.probs_NV * (case.probs_NV.log() - logprobs_NV)).sum(1)


def run(case: Case, objective: PositionLoss, chunk_positions: int = 4) -> LossSums:
    chunk_bytes = chunk_positions * V * 8 * 5
    return chunked_loss(
        case.hidden_ND, case.head, objective, dtype=torch.float64, chunk_bytes=chunk_bytes
    )


def assert_same_gradients(case: Case, loss: Tensor, expected: Tensor) -> None:
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    found = torch.autograd.grad(3.0 * loss, case.parameters)
    wanted = torch.autograd.grad(3.0 * expected, case.parameters)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", HEADS)
def test_cross_entropy_matches_autograd(kind: str) -> None:
    case = make_case(**HEADS[kind])
    loss = run(case, CrossEntropy(case.next_N)).loss
    expected = torch.nn.functional.nll_loss(case.log_softmax(), case.next_N, reduction="sum")
    assert_same_gradients(case, loss, expected)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("encoding", ["threshold", "top_k", "exact"])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_kd_matches_autograd(kind: str, encoding: str, weight: float) -> None:
    case = make_case(**HEADS[kind])
    teacher = TEACHERS[encoding](case)
    result = run(case, Kd(case.next_N, teacher, weight))
    kl = reference_kl(case, teacher).sum()
    ce = torch.nn.functional.nll_loss(case.log_softmax(), case.next_N, reduction="sum")
    assert_same_gradients(case, result.loss, weight * kl + (1 - weight) * ce)
    assert result.sums["kl"].item() == pytest.approx(kl.item(), rel=1e-6)
    assert result.sums["cross_entropy"].item() == pytest.approx(ce.item(), rel=1e-10)


@pytest.mark.parametrize("encoding", ["threshold", "top_k"])
def test_gradients_match_finite_differences(encoding: str) -> None:
    case = make_case(num_positions=3, vocab_size=17, **HEADS["everything"])
    teacher = TEACHERS[encoding](case)
    objective = Kd(case.next_N, teacher, 0.6)

    def loss(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        head = StudentHead(weight_VD, bias_V, case.scale, case.softcap)
        return chunked_loss(hidden_ND, head, objective, dtype=torch.float64).loss

    assert torch.autograd.gradcheck(loss, tuple(case.parameters))


def test_chunk_size_does_not_matter() -> None:
    case = make_case()
    objective = Kd(case.next_N, threshold(case), 0.5)
    whole, single = run(case, objective, 1000).loss, run(case, objective, 1).loss
    assert_same_gradients(case, whole, single)


def test_no_scored_position_gives_zero_gradients() -> None:
    case = make_case(num_positions=0)
    loss = run(case, Kd(case.next_N, threshold(case), 0.5)).loss
    torch.autograd.backward(loss)
    assert loss.item() == 0.0
    assert case.weight_VD.grad is not None and not case.weight_VD.grad.any()
    assert case.hidden_ND.grad is not None and case.hidden_ND.grad.shape == (0, D)


def test_without_grad_nothing_is_differentiated() -> None:
    case = make_case()
    with torch.no_grad():
        loss = run(case, CrossEntropy(case.next_N)).loss
    assert not loss.requires_grad


def test_frozen_head_still_gives_hidden_gradients() -> None:
    case = make_case()
    case.weight_VD.requires_grad_(False)
    torch.autograd.backward(run(case, CrossEntropy(case.next_N)).loss)
    assert case.weight_VD.grad is None and case.hidden_ND.grad is not None


def test_top_k_rest_survives_a_student_that_gives_it_no_mass() -> None:
    """The rest has e^-200 of the student: one minus the kept mass would be 0 and its log -inf."""
    logits_NV = torch.tensor([[0.0, 0.0, -200.0, -201.0]])
    teacher = TopKTeacher(
        token_ids_NK=torch.tensor([[0, 1]]),
        probs_NK=torch.tensor([[0.5, 0.4]]),
        rest_N=torch.tensor([0.1]),
    )
    logprobs_NV = logits_NV.log_softmax(-1)
    kl = float(teacher.kl_(logprobs_NV, slice(0, 1), 1.0).kl_C)
    log_rest = -200.0 + math.log(1 + math.exp(-1.0)) - math.log(2.0)
    p = torch.tensor([0.5, 0.4, 0.1])
    expected = float((p * p.log()).sum()) + 0.9 * math.log(2.0) - 0.1 * log_rest
    assert kl == pytest.approx(expected, rel=1e-5)
    share = torch.tensor([0.0, -1.0]).softmax(0)
    expected_grad = torch.cat([torch.tensor([0.0, 0.1]), -0.1 * share])
    torch.testing.assert_close(logprobs_NV[0], expected_grad)


def test_top_k_of_the_whole_vocabulary_has_no_rest() -> None:
    probs_NV = torch.tensor([[0.5, 0.3, 0.2]])
    teacher = TopKTeacher(torch.tensor([[0, 1, 2]]), probs_NV, torch.tensor([0.0]))
    logprobs_NV = torch.tensor([[1.0, 2.0, -1.0]]).log_softmax(-1)
    expected = (probs_NV * (probs_NV.log() - logprobs_NV)).sum()
    gradient = logprobs_NV.exp() - probs_NV
    assert float(teacher.kl_(logprobs_NV, slice(0, 1), 1.0).kl_C) == pytest.approx(float(expected))
    torch.testing.assert_close(logprobs_NV, gradient)


def test_bfloat16_stays_near_float32() -> None:
    """Products in bfloat16 (8 bits), sums in float32: about 1 % on gradients of this size."""
    case = make_case(num_positions=64)
    objective = Kd(case.next_N, threshold(case), 0.5)
    hidden_ND = case.hidden_ND.detach().float().requires_grad_()
    weight_VD = case.weight_VD.detach().float().requires_grad_()
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        result = chunked_loss(
            hidden_ND, StudentHead(weight_VD), objective, dtype=dtype, chunk_bytes=40_000
        )
        grads.append([result.loss, *torch.autograd.grad(result.loss, [hidden_ND, weight_VD])])
    for wide, narrow in zip(*grads, strict=True):
        assert narrow.dtype == torch.float32
        assert float((narrow - wide).norm() / wide.norm()) < 0.02


def test_gradients_of_a_bfloat16_student_are_rounded_once() -> None:
    """The head's gradient is summed and scaled in float32, then rounded to the head's dtype."""
    case = make_case(num_positions=64)
    objective = Kd(case.next_N, threshold(case), 0.5)
    grads = []
    for dtype in (torch.bfloat16, torch.float32):  # the same values, held in either
        leaves = [each.detach().bfloat16().to(dtype) for each in (case.hidden_ND, case.weight_VD)]
        hidden_ND, weight_VD = (leaf.requires_grad_() for leaf in leaves)
        head = StudentHead(weight_VD)
        result = chunked_loss(
            hidden_ND, head, objective, dtype=torch.bfloat16, chunk_bytes=20 * V * 6
        )
        grads.append(torch.autograd.grad(result.loss / 3, [hidden_ND, weight_VD]))
    for narrow, wide in zip(*grads, strict=True):
        assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32
        assert torch.equal(narrow, wide.bfloat16())


def test_no_block_exceeds_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor a chunk makes is within the budget."""
    case = make_case(num_positions=200)
    seen: list[int] = []
    original = torch.log_softmax

    def watched(values: Tensor, *, dim: int, dtype: torch.dtype) -> Tensor:
        seen.append(values.numel() * 8 * 2)
        return original(values, dim=dim, dtype=dtype)

    monkeypatch.setattr(torch, "log_softmax", watched)
    chunked_loss(
        case.hidden_ND,
        case.head,
        CrossEntropy(case.next_N),
        dtype=torch.float64,
        chunk_bytes=50_000,
    )
    assert len(seen) > 1 and max(seen) <= 50_000


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("own_head", [True, False])
def test_no_two_chunks_are_held_at_once(
    own_head: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a chunk's log-probs are made, those of the chunk before are gone."""
    case = make_case(num_positions=30, softcap=softcap)
    objective = Kd(case.next_N, threshold(case), 0.5)
    made: list[weakref.ref[Tensor]] = []
    original = torch.log_softmax

    def watched(values: Tensor, *, dim: int, dtype: torch.dtype) -> Tensor:
        assert all(block() is None for block in made)
        logprobs = original(values, dim=dim, dtype=dtype)
        made.append(weakref.ref(logprobs))
        return logprobs

    monkeypatch.setattr(torch, "log_softmax", watched)
    if own_head:
        run(case, objective)
    else:
        monkeypatch.setattr(losses_module, "CPU_CHUNK_BYTES", 4 * V * 8 * 5)
        logits_loss(case.log_softmax(), objective)
    assert len(made) > 1
