"""Mixtures of teachers: float64 definitions, finite differences, the true mixture's gradient.

Dimensions: N = positions, V = rows of the student, U = tokens, K = kept entries.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from schemas.reference import token_losses
from stages.models.causal_lm.chunked_loss import LossSums, StudentHead, chunked_loss, logits_loss
from stages.models.causal_lm.language_head import LanguageHead
from stages.student.losses.kl import ExactTeacher, Kd, Teacher, ThresholdTeacher, TopKTeacher
from stages.student.losses.mixture import EachItsOwn, Kind, mixed, next_logprobs_of
from stages.student.objectives.kd import Mixture

N, U, V, K = 9, 31, 34, 5
SHARES = (0.5, 0.2, 0.3)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def xlogx(values: Tensor) -> Tensor:
    return torch.xlogy(values, values).sum(-1)


class Told:
    """A teacher of one encoding, its KL by the definition, its distribution where it is whole."""

    def __init__(self, teacher: Teacher, kl: Callable[[Tensor], Tensor], probs: Any = None) -> None:
        self.teacher, self.kl, self.probs_NV = teacher, kl, probs


def exact(seed: int, rows: int = U + 4, num_token_ids: int | None = U) -> Told:
    logits_NU = 2 * normal(seed, N, rows)
    head = LanguageHead(logits_NU.T.contiguous(), None, 1.0, None, torch.float64, num_token_ids)
    q_NV = torch.nn.functional.pad(logits_NU[:, :num_token_ids].softmax(-1), (0, V))[:, :V]
    teacher = ExactTeacher(torch.eye(N, dtype=torch.float64), -xlogx(logits_NU.softmax(-1)), head)
    return Told(teacher, lambda s: xlogx(q_NV) - (q_NV * s).sum(-1), q_NV)


def threshold(seed: int) -> Told:
    """Two of a position's entries are the same token, as a draw may be; one position has none."""
    ids_NK = normal(seed, N, U).argsort(-1)[:, :K]
    ids_NK[:, 4] = ids_NK[:, 3]
    weights_NK = normal(seed + 1, N, K).softmax(-1)
    entropies_N = normal(seed + 2, N).abs()
    untaught_N = torch.arange(N) == 4
    weights_NK[4], entropies_N[4] = 0.0, 0.0
    heads_N = torch.full((N,), 2)
    teacher = ThresholdTeacher(
        ids_NK.int(), weights_NK, heads_N, entropies_N, torch.full((N,), 0.25), untaught_N
    )
    return Told(teacher, lambda s: -(weights_NK * s.gather(1, ids_NK)).sum(-1) - entropies_N)


def top_k(seed: int) -> Told:
    probs_NU = (2 * normal(seed, N, U)).softmax(-1)
    probs_NK, ids_NK = probs_NU.topk(K)
    rest_N = 1 - probs_NK.sum(-1)

    def kl(s: Tensor) -> Tensor:
        kept = s.gather(1, ids_NK)
        left_N = torch.log1p(-kept.exp().sum(-1))
        return (probs_NK * (probs_NK.log() - kept)).sum(-1) + rest_N * (rest_N.log() - left_N)

    return Told(TopKTeacher(ids_NK.int(), probs_NK, rest_N), kl)


CASES: dict[str, list[Callable[[], Told]]] = {
    "exact": [lambda: exact(1), lambda: exact(2, U + 1), lambda: exact(3, U, None)],
    "threshold": [lambda: threshold(11), lambda: threshold(21), lambda: threshold(31)],
    "top_k": [lambda: top_k(41), lambda: top_k(42), lambda: top_k(43)],
    "one of each": [lambda: exact(1), lambda: threshold(11), lambda: top_k(41)],
}


def total(teacher: Teacher, logits: Tensor, weight: float = 1.0) -> LossSums:
    return logits_loss(logits, Kd(torch.arange(N), teacher, weight))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("num_teachers", [2, 3])
def test_the_arithmetic_loss_is_the_weighted_mean(
    case: str, weight: float, num_teachers: int
) -> None:
    told = [make() for make in CASES[case][:num_teachers]]
    given = SHARES[:num_teachers]
    shares = [share / sum(given) for share in given]
    logits = normal(5, N, V).requires_grad_()
    found = total(mixed([each.teacher for each in told], "arithmetic", given), logits, weight)
    s = logits.log_softmax(-1)
    kl_N = sum(share * each.kl(s) for share, each in zip(shares, told, strict=True))
    assert isinstance(kl_N, Tensor)
    cross_N = -s.gather(1, torch.arange(N)[:, None])[:, 0]
    wanted = (weight * kl_N + (1 - weight) * cross_N).sum()
    torch.testing.assert_close(found.loss, wanted)
    torch.testing.assert_close(found.sums["kl"], kl_N.sum())
    one, other = (torch.autograd.grad(x, logits)[0] for x in (found.loss, wanted))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", CASES)
def test_arithmetic_gradients_match_finite_differences(case: str) -> None:
    teacher = mixed([make().teacher for make in CASES[case]], "arithmetic", SHARES)
    logits = normal(6, N, V).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: total(teacher, z, 0.7).loss, (logits,))


def test_geometric_gradients_match_finite_differences() -> None:
    teacher = mixed([make().teacher for make in CASES["exact"]], "geometric", SHARES)
    logits = normal(6, N, V).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: total(teacher, z, 0.7).loss, (logits,))


def test_the_arithmetic_gradient_is_that_of_the_true_mixture() -> None:
    """And the value differs by the Jensen-Shannon divergence of the teachers, no more."""
    told = [make() for make in CASES["exact"]]
    logits = normal(7, N, V).requires_grad_()
    found = total(mixed([each.teacher for each in told], "arithmetic", SHARES), logits)
    p = torch.stack([share * t.probs_NV for share, t in zip(SHARES, told, strict=True)]).sum(0)
    wanted = (xlogx(p) - (p * logits.log_softmax(-1)).sum(-1)).sum()
    one, other = (torch.autograd.grad(x, logits)[0] for x in (found.loss, wanted))
    torch.testing.assert_close(one, other)
    apart = sum(share * xlogx(t.probs_NV) for share, t in zip(SHARES, told, strict=True)) - xlogx(p)
    torch.testing.assert_close(found.loss - wanted, apart.sum())
    assert float(apart.min()) > 0.01


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_the_geometric_loss_is_the_kl_to_the_normalised_product(weight: float) -> None:
    told = [make() for make in CASES["exact"]]
    logits = normal(8, N, V).requires_grad_()
    teacher = mixed([each.teacher for each in told], "geometric", [5, 2, 3])
    found = total(teacher, logits, weight)
    product = torch.ones(N, U, dtype=torch.float64)
    for share, each in zip(SHARES, told, strict=True):
        product = product * each.probs_NV[:, :U] ** share
    p = product / product.sum(-1, keepdim=True)
    s = logits.log_softmax(-1)
    kl = (xlogx(p) - (p * s[:, :U]).sum(-1)).sum()
    cross = -s.gather(1, torch.arange(N)[:, None]).sum()
    wanted = weight * kl + (1 - weight) * cross
    torch.testing.assert_close(found.loss, wanted)
    torch.testing.assert_close(found.sums["kl"], kl)
    of_teachers = [each.probs_NV[:, :U].log().numpy() for each in told]
    in_numpy_N = token_losses.geometric_kl(logits.detach().numpy(), of_teachers, [5, 2, 3])
    assert kl.item() == pytest.approx(in_numpy_N.sum())
    one, other = (torch.autograd.grad(x, logits)[0] for x in (found.loss, wanted))
    torch.testing.assert_close(one, other)
    assert torch.equal(teacher.top_token_ids(slice(2, 7)), p[2:7].argmax(-1))


def test_a_token_that_one_teacher_lacks_has_no_geometric_probability() -> None:
    small, large = exact(1, 20, None), exact(2, U, None)
    logits = normal(9, N, V).requires_grad_()
    found = total(mixed([small.teacher, large.teacher], "geometric", (1, 1)), logits)
    (gradient,) = torch.autograd.grad(found.loss, logits)
    torch.testing.assert_close(gradient[:, 20:], logits.softmax(-1)[:, 20:])
    assert float(gradient[:, :20].min()) < 0


def test_what_each_teacher_dropped_is_counted_by_its_weight() -> None:
    told = [threshold(11), exact(1)]
    lost = (2 * normal(1, N, U + 4)).softmax(-1)[:, U:].sum()
    found = total(mixed([t.teacher for t in told], "arithmetic", (1, 3)), normal(5, N, V))
    torch.testing.assert_close(found.sums["dropped_mass"], 0.25 * 0.25 * N + 0.75 * lost)


def test_the_likeliest_token_is_told_where_all_teachers_agree() -> None:
    one, other = exact(1), exact(2)
    both = mixed([one.teacher, other.teacher], "arithmetic", (1, 1))
    same = mixed([one.teacher, one.teacher], "arithmetic", (1, 1))
    first, second = one.probs_NV.argmax(-1), other.probs_NV.argmax(-1)
    assert (first != second).any()
    found = both.top_token_ids(slice(0, N))
    assert torch.equal(found, torch.where(first == second, first, -1))
    assert torch.equal(same.top_token_ids(slice(3, 8)), first[3:8])


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
def test_float32_holds_where_probabilities_do_not(kind: Kind) -> None:
    """Each teacher is sure of another token, by hundreds of nats."""
    logits_NU = [normal(seed, N, U) for seed in (51, 52)]
    logits_NU[0][0, 3], logits_NU[1][0, 4] = 300.0, 200.0
    teachers: list[Teacher] = []
    for values in logits_NU:
        head = LanguageHead(values.float().T.contiguous(), None, 1.0, None, torch.float32, None)
        teachers.append(ExactTeacher(torch.eye(N), -xlogx(values.softmax(-1)).float(), head))
    logits = normal(53, N, V)
    logits[0, 5] = 150.0
    narrow, wide = logits.float().requires_grad_(), logits.clone().requires_grad_()
    t = [values.log_softmax(-1) for values in logits_NU]
    s = wide.log_softmax(-1)[:, :U]
    if kind == "geometric":
        p = (0.5 * t[0] + 0.5 * t[1]).log_softmax(-1)
        wanted = (p.exp() * (p - s)).sum()
    else:
        wanted = sum((0.5 * (p.exp() * (p - s)).sum() for p in t), torch.zeros(()).double())
    found = total(mixed(teachers, kind, (1, 1)), narrow).loss
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    one, other = torch.autograd.grad(found, narrow)[0], torch.autograd.grad(wanted, wide)[0]
    assert torch.isfinite(one).all()
    torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5)


def test_positions_of_several_data_sets_in_any_chunk() -> None:
    """Each is taught by its own teacher, wherever chunks end."""
    told = [threshold(11), exact(1), top_k(41)]
    stops = (2, 5, 9)
    starts = (0, 2, 5)
    hidden_ND, weight_VD = normal(61, 9, 6).requires_grad_(), normal(62, V, 6).requires_grad_()
    next_N = torch.arange(9) * 3
    pieces = zip(told, starts, stops, strict=True)
    losses = tuple(Kd(next_N[a:b], each.teacher, 0.7) for each, a, b in pieces)
    s = (hidden_ND @ weight_VD.T).log_softmax(-1)
    wanted = torch.zeros((), dtype=torch.float64)
    for each, a, b in zip(told, starts, stops, strict=True):
        padded = torch.cat([s[a:b], s[: N - (b - a)]])  # a teacher's positions count from 0
        cross = -s[a:b].gather(1, next_N[a:b, None]).sum()
        wanted = wanted + 0.7 * each.kl(padded)[: b - a].sum() + 0.3 * cross
    expected = torch.autograd.grad(wanted, (hidden_ND, weight_VD))
    loss = EachItsOwn(losses, stops)
    for chunk_bytes in (1, 4 * 8 * V * 6, 1 << 30):
        found = chunked_loss(
            hidden_ND, StudentHead(weight_VD), loss, dtype=torch.float64, chunk_bytes=chunk_bytes
        )
        torch.testing.assert_close(found.loss, wanted)
        grads = torch.autograd.grad(found.loss, (hidden_ND, weight_VD))
        for one, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_log_probs_of_the_next_token_are_the_mixtures() -> None:
    told_TN = torch.tensor([[-1.0, -300.0], [-2.0, -301.0]])
    columns = {"teachers": [{"teacher_next_logprobs_N": told_N} for told_N in told_TN]}
    mixture = Mixture(kind="arithmetic", weights=(3, 1))
    first = math.log(0.75 * math.exp(-1) + 0.25 * math.exp(-2))
    second = -300 + math.log(0.75 + 0.25 * math.exp(-1))
    torch.testing.assert_close(next_logprobs_of(columns, mixture), torch.tensor([first, second]))
    assert next_logprobs_of(columns, Mixture(kind="geometric", weights=(3, 1))).isnan().all()
    alone = {"teachers": columns["teachers"][:1]}
    assert torch.equal(next_logprobs_of(alone, None), told_TN[0])
