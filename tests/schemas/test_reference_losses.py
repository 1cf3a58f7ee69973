"""The numpy losses against the torch ones that our trainer uses: 1e-9 apart in float64.

Where the torch side holds a number in float32 (a teacher's hidden states, logs of its entries)
they are 2e-5 apart.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.reference import (
    divergences,
    icl_losses,
    preference_losses,
    span_losses,
    token_losses,
)
from schemas.reference.head import read_head
from stages.models.causal_lm.chunked_loss import PositionLoss, logits_loss
from stages.models.causal_lm.language_head import LanguageHead
from stages.student.losses.step import Term, Unit
from stages.student.objectives.adpa import AdpaConfig
from stages.student.objectives.alm import AlmConfig
from stages.student.objectives.bialign import BiAlignConfig
from stages.student.objectives.cross_entropy import CrossEntropyConfig
from stages.student.objectives.dckd import DckdConfig
from stages.student.objectives.dpo import DpoConfig
from stages.student.objectives.icl_distillation import IclDistillationConfig
from stages.student.objectives.kd import KdConfig
from stages.student.objectives.opd import OpdConfig
from stages.student.objectives.sft import SftConfig

N, V, U, K, D = 7, 23, 19, 5, 6
RNG = np.random.default_rng(3)
LOGITS_NV = RNG.normal(size=(N, V)) * 2
NEXT_N = RNG.integers(0, V, N)
IDS_NK = np.stack([RNG.choice(V, K, replace=False) for _ in range(N)])
Batch = dict[str, Any]


@dataclass
class LogitsStep:
    """What an objective asks of a step, on logits and log-probs that are given."""

    logits_NV: Tensor
    answers: tuple[Tensor, ...] = ()
    teacher_head: LanguageHead | None = None
    lm_teacher_head: LanguageHead | None = None
    advantage_heads: Any = None
    progress: float = 0.0

    def hidden_states(self, batch: Batch) -> Tensor:
        return self.logits_NV

    def over_positions(self, batch: Batch, objective: PositionLoss) -> Term:
        return self.over(self.logits_NV, objective)

    def over(self, logits_NV: Tensor, objective: PositionLoss, unit: Unit = "tokens") -> Term:
        result = logits_loss(logits_NV, objective)
        return Term(result.loss, result.sums, unit)

    def logprobs_of(self, logits_NV: Tensor, token_ids_N: Tensor) -> Tensor:
        return logits_NV.log_softmax(-1).gather(1, token_ids_N[:, None])[:, 0]

    def answer_logprobs(self, asked: Any, *, wrapped: bool = False) -> tuple[Tensor, ...]:
        return self.answers


def tensors(batch: Batch) -> Batch:
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in batch.items()
    }


def total_of(objective: Any, batch: Batch, step: LogitsStep) -> float:
    """Return the sum of all terms, before any division by a count."""
    return sum(float(t.weight * t.total) for t in objective.terms(tensors(batch), step))


def on_logits(**others: Any) -> LogitsStep:
    return LogitsStep(torch.from_numpy(LOGITS_NV), **others)


def teachers(encoding: str, folder: Path) -> tuple[Batch, LanguageHead | None, np.ndarray]:
    """Return a batch's columns, the head of ``exact``, and the reference's KL [N]."""
    if encoding == "threshold":
        weights_NK = RNG.dirichlet(np.ones(K), N)
        columns = {"token_ids_NK": IDS_NK, "weights_NK": weights_NK, "entropies_N": RNG.random(N)}
        kl_N = token_losses.threshold_kl(
            LOGITS_NV, IDS_NK, weights_NK, np.asarray(columns["entropies_N"])
        )
        return columns | {"num_head_N": np.zeros(N), "dropped_N": np.zeros(N)}, None, kl_N
    if encoding == "top_k":
        mass_NK = RNG.dirichlet(np.ones(K + 1), N)
        mass_NK[0] = [*RNG.dirichlet(np.ones(K)), 0.0]  # nothing outside the kept
        probs_NK, rest_N = mass_NK[:, :K], mass_NK[:, K]
        columns = {"token_ids_NK": IDS_NK, "probs_NK": probs_NK, "rest_N": rest_N}
        kl_N = token_losses.top_k_kl(LOGITS_NV, IDS_NK, probs_NK * 1.01, rest_N * 1.01)
        return columns | {"dropped_N": np.zeros(N)}, None, kl_N
    head = LanguageHead(
        torch.randn(U, D, generator=torch.Generator().manual_seed(0)).bfloat16().float(),
        torch.linspace(-1, 1, U).bfloat16().float(),
        0.7,
        5.0,
        torch.bfloat16,
    )
    head.save(folder)
    hidden_ND = RNG.normal(size=(N, D)).astype(np.float16)
    teacher_NU = read_head(folder).logits(hidden_ND)
    expected_NU = head.logits(torch.from_numpy(hidden_ND)).numpy()
    np.testing.assert_allclose(teacher_NU, expected_NU, rtol=1e-5, atol=1e-5)
    logprobs_NU = token_losses.log_softmax(teacher_NU)
    entropies_N = -(np.exp(logprobs_NU) * logprobs_NU).sum(axis=1)
    kl_N = token_losses.exact_kl(LOGITS_NV, teacher_NU)
    return {"hidden_ND": hidden_ND, "entropies_N": entropies_N}, head, kl_N


@pytest.mark.parametrize("encoding", ["threshold", "top_k", "exact"])
def test_kd_of_each_encoding(encoding: str, tmp_path: Path) -> None:
    columns, head, kl_N = teachers(encoding, tmp_path)
    batch = columns | {"next_token_ids_N": NEXT_N}
    found = total_of(KdConfig(weight=0.7), batch, on_logits(teacher_head=head))
    cross_N = token_losses.cross_entropy(LOGITS_NV, NEXT_N)
    expected = token_losses.kd(kl_N, cross_N, 0.7).sum()
    assert found == pytest.approx(expected, abs=2e-5 if encoding == "exact" else 1e-9)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("forward_kl", {}),
        ("reverse_kl", {}),
        ("skewed_kl", {"alpha": 0.3}),
        ("skewed_reverse_kl", {"alpha": 0.3}),
        ("jensen_shannon", {"beta": 0.2}),
        ("total_variation", {}),
    ],
)
def test_kd_by_divergence(kind: str, settings: dict[str, float], tmp_path: Path) -> None:
    """The student has four tokens more than the teacher."""
    columns, head, _ = teachers("exact", tmp_path)
    chosen: Any = {"kind": kind, **settings}
    config = KdConfig(weight=0.7, divergence=chosen, temperature=1.7)
    step = on_logits(teacher_head=head)
    found = total_of(config, columns | {"next_token_ids_N": NEXT_N}, step)
    teacher_NU = read_head(tmp_path).logits(columns["hidden_ND"])
    apart_N = getattr(divergences, kind)(LOGITS_NV, teacher_NU, temperature=1.7, **settings)
    factor = 1.7 if kind == "total_variation" else 1.7**2
    cross_N = token_losses.cross_entropy(LOGITS_NV, NEXT_N)
    expected = token_losses.kd(factor * apart_N, cross_N, 0.7).sum()
    assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_alm(temperature: float) -> None:
    lengths_S, teacher_S = np.array([1, 4, 2]), np.array([-0.5, -9.0, 0.0])
    batch = {
        "next_token_ids_N": NEXT_N,
        "span_of_N": np.repeat(np.arange(3), lengths_S),
        "span_logprobs_S": teacher_S,
    }
    found = total_of(AlmConfig(weight=0.7, temperature=temperature), batch, on_logits())
    cross_N = token_losses.cross_entropy(LOGITS_NV, NEXT_N)
    student_S = span_losses.span_sums(-cross_N, lengths_S)
    divergence_S = span_losses.alm(student_S, teacher_S, temperature)
    assert found == pytest.approx(0.7 * divergence_S.sum() + 0.3 * cross_N.sum(), abs=1e-9)


@pytest.mark.parametrize("objective", [CrossEntropyConfig(), SftConfig()])
def test_cross_entropy(objective: Any) -> None:
    found = total_of(objective, {"next_token_ids_N": NEXT_N}, on_logits())
    expected = token_losses.cross_entropy(LOGITS_NV, NEXT_N).sum()
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("ranks_N", [[1, 2, 3, 4], [2, 1, 2, 4], [1, 1, 1, 1]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bialign(ranks_N: list[int], reduction: Any, tmp_path: Path) -> None:
    columns, _, kl_N = teachers("top_k", tmp_path)
    logprobs_N = RNG.normal(size=4) * 5
    batch = columns | {"next_token_ids_N": NEXT_N, "subsets": [], "ranks": [torch.tensor(ranks_N)]}
    step = on_logits(answers=(torch.from_numpy(logprobs_N),))
    objective = BiAlignConfig(rank_weight=0.4, kl_reduction=reduction)
    kl, ranking = objective.terms(tensors(batch), step)  # type: ignore[arg-type]
    assert (kl.unit, ranking.unit) == ("tokens" if reduction == "mean" else "samples", "samples")
    found = float(kl.total) / (N if reduction == "mean" else 1) + 0.4 * float(ranking.total)
    ranks = icl_losses.ranking_loss(logprobs_N, np.array(ranks_N))
    assert found == pytest.approx(icl_losses.bialign(kl_N, [ranks], 0.4, reduction), abs=1e-9)


@pytest.mark.parametrize("kind", ["mean", "sum"])
@pytest.mark.parametrize("gold", [2, -1])
def test_icl_distillation(kind: Any, gold: int, tmp_path: Path) -> None:
    columns, _, kl_N = teachers("threshold", tmp_path)
    count = 4 if gold >= 0 else 1
    logprobs_N, teacher_N = -RNG.random(count) * 9, -RNG.random(count) * 9
    lengths_N = np.arange(1, count + 1)
    batch = {
        "answers": [],
        "num_tokens": [torch.from_numpy(lengths_N)],
        "gold": [gold],
        "teacher_logprobs": [torch.from_numpy(teacher_N)],
        "lm": tensors(columns | {"next_token_ids_N": NEXT_N}),
    }
    alpha = 0.3
    objective = IclDistillationConfig(
        lm_weight=0.2, alpha_start=alpha, alpha_end=alpha, candidate_score=kind
    )
    found = total_of(objective, batch, on_logits(answers=(torch.from_numpy(logprobs_N),)))
    episode = icl_losses.icl_distillation(logprobs_N, lengths_N, gold, teacher_N, alpha, kind)
    cross_N = token_losses.cross_entropy(LOGITS_NV, NEXT_N)
    text_N = icl_losses.icl_text(kl_N, cross_N, columns["entropies_N"], alpha)
    assert found == pytest.approx(episode + 0.2 * text_N.sum(), abs=1e-9)


def test_opd() -> None:
    teacher_N, writer_N = -RNG.random(N) * 4, -RNG.random(N) * 4
    others = {"teacher_logprobs_N": teacher_N, "writer_logprobs_N": writer_N}
    found = total_of(OpdConfig(clip=0.3), others | {"next_token_ids_N": NEXT_N}, on_logits())
    expected = token_losses.opd(LOGITS_NV, NEXT_N, teacher_N, writer_N, clip=0.3).sum()
    assert found == pytest.approx(expected, abs=1e-9)


def test_dpo() -> None:
    logprobs_B2, reference_B2 = RNG.normal(size=(5, 2)) * 30, RNG.normal(size=(5, 2)) * 30
    batch = {"answers": [], "reference_logprobs": reference_B2}
    step = on_logits(answers=tuple(torch.from_numpy(logprobs_B2)))
    found = total_of(DpoConfig(beta=0.3), batch, step)
    expected = preference_losses.dpo(logprobs_B2, reference_B2, 0.3).sum()
    assert found == pytest.approx(expected, abs=1e-9)


def test_dckd(tmp_path: Path) -> None:
    columns, _, kl_N = teachers("top_k", tmp_path)
    chosen, rejected = slice(0, 3), slice(3, N)
    lengths_N = np.array([3.0] * 3 + [4.0] * (N - 3))
    batch = columns | {"next_token_ids_N": NEXT_N, "num_chosen": 3, "weights_N": 1 / lengths_N}
    settings = {"sft_weight": 0.9, "alpha": 2.0, "chosen_weight": 0.3, "rejected_weight": 0.2}
    found = total_of(DckdConfig(**settings), batch, on_logits())
    cross_N = token_losses.cross_entropy(LOGITS_NV, NEXT_N)
    expected = preference_losses.dckd(cross_N[chosen], kl_N[chosen], kl_N[rejected], **settings)
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("support", ["sparse", "as_released", "exact"])
def test_adpa(support: str) -> None:
    """Three positions are of the chosen response; of the student's two, one has one token."""
    rows = slice(3, N)
    logits_MV, mode = LOGITS_NV[rows], "paper"
    heads: Any = None
    if support == "exact":
        shapes = [(U, D), (U, D)]
        weights = [torch.from_numpy(RNG.normal(size=shape)).float() for shape in shapes]
        heads = tuple(LanguageHead(w, None, 1.0, None, torch.float32) for w in weights)
        hidden = [RNG.normal(size=(N - 3, D)).astype(np.float32) for _ in heads]
        columns: Batch = {"teacher_hidden_MD": hidden[0], "reference_hidden_MR": hidden[1]}
        columns["beta"] = 0.5
        logits = [h @ w.numpy().T for h, w in zip(hidden, weights, strict=True)]
        gained_M = preference_losses.exact_expected_advantage(logits_MV, logits[0], logits[1], 0.5)
    else:
        values_MK, rest_M = RNG.normal(size=(N - 3, K)), RNG.normal(size=N - 3)
        columns = {"token_ids_MK": IDS_NK[rows], "values_MK": values_MK, "rest_M": rest_M}
        if support == "as_released":
            mode, values_MK = support, np.clip(values_MK, 1e-8, 1 - 1e-8)
        gained_M = preference_losses.expected_advantage(logits_MV, IDS_NK[rows], values_MK, rest_M)
    weights_N = np.array([1 / 3] * 3 + [1 / 2] + [1 / 6] * 3)
    batch = {
        "next_token_ids_N": NEXT_N,
        "num_chosen": 3,
        "num_samples": 1,
        "weights_N": weights_N,
        "advantages": tensors(columns),
    }
    objective = AdpaConfig(sft_weight=0.8, gamma=1.2, mode=mode)
    found = total_of(objective, batch, on_logits(advantage_heads=heads))
    cross_P = token_losses.cross_entropy(LOGITS_NV, NEXT_N)[:3]
    expected = preference_losses.adpa(cross_P, [gained_M[:1], gained_M[1:]], 0.8, 1.2)
    assert found == pytest.approx(expected, abs=2e-5 if support == "exact" else 1e-9)
