"""On-policy distillation: the loss by its definition, what its means are, and what it refuses.

Expectations over sampled tokens are sums over a small vocabulary, so they have no error but that of
float64. Dimensions: N = sampled tokens, V = vocabulary, D = hidden width.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.errors import ConfigError
from schemas.reference import token_losses
from schemas.tables.response_logprobs import RESPONSE_LOGPROBS
from schemas.tables.response_token_logprobs import RESPONSE_TOKEN_LOGPROBS
from schemas.tables.responses import RESPONSES
from stages.models.causal_lm.chunked_loss import StudentHead, chunked_loss, logits_loss
from stages.stage import TableRef
from stages.student.losses.opd import OnPolicyDistillation
from stages.student.objectives.opd import OpdConfig

N, V, D = 40, 11, 6
F64 = torch.float64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def sampled(drift: float = 0.5, **settings: Any) -> tuple[Tensor, OnPolicyDistillation]:
    """A student's logits [N, V], and tokens that a writer so far from it has sampled."""
    logits_NV = normal(N, V, seed=1).requires_grad_()
    writer_NV = (logits_NV.detach() + drift * normal(N, V, seed=2)).log_softmax(-1)
    teacher_NV = normal(N, V, seed=3).log_softmax(-1)
    ids_N = torch.multinomial(writer_NV.exp(), 1, generator=torch.Generator().manual_seed(4))[:, 0]
    teacher_N, writer_N = (each.gather(1, ids_N[:, None])[:, 0] for each in (teacher_NV, writer_NV))
    return logits_NV, OnPolicyDistillation(ids_N, teacher_N, writer_N, **settings)


def frozen_surrogate(logits_NV: Tensor, loss: OnPolicyDistillation, advantage_N: Tensor) -> Tensor:
    """The definition, with the advantage as a number that does not move with the student."""
    own_N = logits_NV.log_softmax(-1).gather(1, loss.token_ids_N[:, None])[:, 0]
    if loss.clip is None:
        return -(advantage_N * own_N).sum()
    ratio_N = (own_N - loss.writer_logprobs_N).exp()
    bounded_N = ratio_N.clamp(1 - loss.clip, 1 + loss.clip)
    return -torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N).sum()


def advantages_of(logits_NV: Tensor, loss: OnPolicyDistillation) -> Tensor:
    own_NV = logits_NV.detach().log_softmax(-1)
    advantage_N = loss.teacher_logprobs_N - own_NV.gather(1, loss.token_ids_N[:, None])[:, 0]
    most = loss.max_advantage
    return advantage_N if most is None else advantage_N.clamp(-most, most)


SETTINGS: list[dict[str, Any]] = [
    {"clip": 0.2},
    {"clip": 0.2, "max_advantage": 0.7},
    {"clip": 1000.0},
    {"clip": None},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_loss_and_gradient_are_those_of_the_definition(settings: dict[str, Any]) -> None:
    """Against float64 autograd on the dense formula, through a head, 3 positions a chunk."""
    hidden_ND, weight_VD = normal(N, D, seed=5).requires_grad_(), normal(V, D, seed=6)
    weight_VD.requires_grad_()
    _, loss = sampled(**settings)
    logits_NV = hidden_ND @ weight_VD.T
    expected = frozen_surrogate(logits_NV, loss, advantages_of(logits_NV, loss))
    wanted = torch.autograd.grad(expected, [hidden_ND, weight_VD])
    found = chunked_loss(hidden_ND, StudentHead(weight_VD), loss, dtype=F64, chunk_bytes=3 * V * 16)
    torch.testing.assert_close(found.loss, expected.detach(), check_dtype=False)
    torch.testing.assert_close(torch.autograd.grad(found.loss, [hidden_ND, weight_VD]), wanted)


def test_the_gradient_is_a_finite_difference() -> None:
    """Of the loss with its advantages held, which is what the formula says of them."""
    logits_NV, loss = sampled()
    advantage_N = advantages_of(logits_NV, loss)
    (grad_NV,) = torch.autograd.grad(logits_loss(logits_NV, loss).loss, [logits_NV])
    step, places = 1e-6, [(0, 3), (7, int(loss.token_ids_N[7])), (23, 0), (39, 10)]
    for place in places:
        sides = []
        for sign in (1, -1):
            moved_NV = logits_NV.detach().clone()
            moved_NV[place] += sign * step
            sides.append(float(frozen_surrogate(moved_NV, loss, advantage_N)))
        difference = (sides[0] - sides[1]) / (2 * step)
        assert float(grad_NV[place]) == pytest.approx(difference, abs=1e-7)


def test_the_loss_is_the_numpy_reference() -> None:
    logits_NV, loss = sampled()
    found = float(logits_loss(logits_NV, loss).loss.detach())
    expected_N = token_losses.opd(
        logits_NV.detach().numpy(),
        loss.token_ids_N.numpy(),
        loss.teacher_logprobs_N.numpy(),
        loss.writer_logprobs_N.numpy(),
    )
    assert found == pytest.approx(float(expected_N.sum()), rel=1e-12)


def test_a_student_that_is_the_writer_has_the_gradient_of_reinforce() -> None:
    """Ratio 1: the gradient of ``-A log s(y)``, with and without importance; nothing is stale."""
    gradients = []
    for clip in (0.2, None):
        logits_NV, loss = sampled(drift=0.0, clip=clip)
        found = logits_loss(logits_NV, loss)
        gradients.append(torch.autograd.grad(found.loss, [logits_NV])[0])
        assert float(found.sums["ratio"]) == pytest.approx(N)
        for name in ("clipped", "staleness", "staleness_k1"):
            assert float(found.sums[name]) == pytest.approx(0.0, abs=1e-12)
    own_N = logits_NV.log_softmax(-1).gather(1, loss.token_ids_N[:, None])[:, 0]
    reinforce = -(advantages_of(logits_NV, loss) * own_N).sum()
    (wanted_NV,) = torch.autograd.grad(reinforce, [logits_NV])
    for grad_NV in gradients:
        torch.testing.assert_close(grad_NV, wanted_NV)


def every_token(drift: float, **settings: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    """One prefix: student's logits [V], log-probs [V] of teacher and writer, a loss a token."""
    logits_V = normal(V, seed=7).requires_grad_()
    writer_V = (logits_V.detach() + drift * normal(V, seed=8)).log_softmax(-1)
    teacher_V = normal(V, seed=9).log_softmax(-1)
    loss = OnPolicyDistillation(torch.arange(V), teacher_V, writer_V, **settings)
    return logits_V, teacher_V, writer_V, loss


def test_the_mean_gradient_is_that_of_the_reverse_kl() -> None:
    """Over all tokens the writer could have drawn, where nothing is clipped; r makes it so."""
    logits_V, teacher_V, writer_V, loss = every_token(0.5, clip=1e9)
    own_V = logits_V.log_softmax(-1)
    kl = (own_V.exp() * (own_V - teacher_V)).sum()
    (wanted_V,) = torch.autograd.grad(kl, [logits_V])
    means: dict[Any, Tensor] = {}
    for clip in (1e9, None):
        logits_VV = logits_V.detach().expand(V, V).clone().requires_grad_()
        found = logits_loss(logits_VV, replace(loss, clip=clip))
        (grad_VV,) = torch.autograd.grad(found.loss, [logits_VV])
        means[clip] = writer_V.exp() @ grad_VV
    torch.testing.assert_close(means[1e9], wanted_V)
    assert float((means[None] - wanted_V).norm()) > 0.1 * float(wanted_V.norm())


def test_the_means_of_what_is_reported_are_the_divergences() -> None:
    """``reverse_kl`` is KL(student || teacher), both staleness estimates KL(writer || student)."""
    logits_V, teacher_V, writer_V, loss = every_token(0.5)
    own_V = logits_V.detach().log_softmax(-1)
    sums = [
        OnPolicyDistillation(*(each[None] for each in tokens))
        for tokens in zip(loss.token_ids_N, teacher_V, writer_V, strict=True)
    ]
    found = [logits_loss(logits_V.detach()[None], each).sums for each in sums]
    mean = {
        name: float(sum(q * each[name] for q, each in zip(writer_V.exp(), found, strict=True)))
        for name in ("reverse_kl", "staleness", "staleness_k1", "ratio")
    }
    reverse_kl = float((own_V.exp() * (own_V - teacher_V)).sum())
    staleness = float((writer_V.exp() * (writer_V - own_V)).sum())
    assert mean["reverse_kl"] == pytest.approx(reverse_kl, rel=1e-10)
    assert mean["staleness"] == pytest.approx(staleness, rel=1e-10)
    assert mean["staleness_k1"] == pytest.approx(staleness, rel=1e-10)
    assert mean["ratio"] == pytest.approx(1.0, rel=1e-10)
    assert all(float(each["staleness"]) >= 0 for each in found)
    assert any(float(each["staleness_k1"]) < 0 for each in found)


@pytest.mark.parametrize(
    ("ratio", "advantage", "is_clipped"),
    [
        *((1.5, 1.0, True), (1.1, 1.0, False), (0.5, 1.0, False)),
        *((0.5, -1.0, True), (0.9, -1.0, False), (1.5, -1.0, False)),
    ],
)
def test_a_token_is_left_alone_once_it_has_moved_its_way(
    ratio: float, advantage: float, is_clipped: bool
) -> None:
    logits_1V = normal(1, V, seed=10).requires_grad_()
    own = logits_1V.detach().log_softmax(-1)[0, 4]
    parts = (torch.tensor([4]), (own + advantage)[None], (own - np.log(ratio))[None])
    found = logits_loss(logits_1V, OnPolicyDistillation(*parts, clip=0.2))
    (grad_1V,) = torch.autograd.grad(found.loss, [logits_1V])
    assert float(found.sums["clipped"]) == float(is_clipped)
    assert (float(grad_1V.abs().max()) == 0.0) is is_clipped
    bound = min(max(ratio, 0.8), 1.2)
    assert float(found.loss.detach()) == pytest.approx(-min(ratio * advantage, bound * advantage))
    if not is_clipped:
        assert float(grad_1V[0, 4]) * advantage < 0  # down the loss is towards the teacher


WRITER = {"step": "w", "dtype": "float32", "engine": "vllm"}
TEACHER = {"weights": "t", "dtype": "float32", "engine": "vllm"}


def refs(**changes: Any) -> list[TableRef]:
    said = TableRef("said", RESPONSES, WRITER, "fingerprint")
    scored = TableRef("scored", RESPONSE_TOKEN_LOGPROBS, TEACHER, "other", ("fingerprint",))
    return [said, replace(scored, **changes)]


def test_tables_whose_roles_cannot_be_told_apart_are_refused() -> None:
    objective = OpdConfig()
    objective.check(refs())
    with pytest.raises(ConfigError, match="'scored' scores other responses than those"):
        objective.check(refs(inputs=("another",)))
    with pytest.raises(ConfigError, match="'said' was written and 'scored' scored by one model"):
        objective.check(refs(made_by={**WRITER, "dtype": "bfloat16"}))
    kinds = [(RESPONSES.name, ""), (RESPONSE_LOGPROBS.name, "")]
    with pytest.raises(ConfigError, match="set per_token to true in the step that makes it"):
        objective.require(kinds, [])
    with pytest.raises(ConfigError, match="'opd' needs a response_token_logprobs table"):
        objective.require(kinds[:1], [])


@pytest.mark.parametrize("staleness", [0.21, float("nan"), float("inf")])
def test_a_student_too_far_from_the_writer_is_refused(staleness: float) -> None:
    objective = OpdConfig()
    objective.check_logged({"staleness": 0.2}, 3)
    with pytest.raises(
        ConfigError, match=r"at step 3 the student is .* max_staleness is 0\.2: take"
    ):
        objective.check_logged({"staleness": staleness}, 3)
