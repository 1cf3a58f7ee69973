"""What the three encodings' KL values mean, on real (if tiny) distributions.

Dimensions: N = positions, V = vocabulary, K = kept entries.
"""

from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from schemas.distribution import quantise_sticks, uniforms, unpack_threshold
from schemas.tables import TABLES
from stages.models.causal_lm.chunked_loss import StudentHead, chunked_loss
from stages.signals.scoring.encoding import measure, threshold_sample
from stages.student.evaluate.positions import Scores
from stages.student.losses.kl import Kd, ThresholdTeacher, TopKTeacher
from stages.student.objectives import ObjectiveConfig

N, V, K = 24, 211, 8


def distributions() -> tuple[Tensor, Tensor]:
    """Teacher logits and log-probs of a student that is near it."""
    generator = torch.Generator().manual_seed(5)
    teacher_NV = 3 * torch.randn(N, V, generator=generator)
    student_NV = teacher_NV + torch.randn(N, V, generator=generator)
    return teacher_NV, student_NV.log_softmax(-1)


def full_kl(teacher_NV: Tensor, logprobs_NV: Tensor) -> Tensor:
    target_NV = teacher_NV.log_softmax(-1)
    return (target_NV.exp() * (target_NV - logprobs_NV)).sum(1)


def threshold_teacher(teacher_NV: Tensor, seed: int) -> ThresholdTeacher:
    measured = measure(teacher_NV.clone(), torch.zeros(N, dtype=torch.int64))
    draws_NK = uniforms(seed * 7919, N, K + 1)
    sample = threshold_sample(measured, torch.from_numpy(draws_NK[:, 0].copy()), k=K)
    codes_NK = quantise_sticks(sample.fractions_PK.numpy(), draws_NK[:, 1:])
    num_head_N = sample.num_head_P.numpy()
    in_head_NK = torch.arange(K).numpy() < num_head_N[:, None]
    weights_NK = unpack_threshold(sample.token_ids_PK.numpy(), num_head_N, codes_NK[in_head_NK])
    return ThresholdTeacher(
        sample.token_ids_PK, torch.from_numpy(weights_NK), sample.num_head_P, measured.entropies_P
    )


def top_k_teacher(teacher_NV: Tensor, k: int) -> TopKTeacher:
    probs_NV, ids_NV = teacher_NV.softmax(-1).sort(descending=True)
    return TopKTeacher(ids_NV[:, :k], probs_NV[:, :k], probs_NV[:, k:].sum(1))


def test_threshold_is_unbiased_and_a_single_value_can_be_negative() -> None:
    """The mean over draws is the full KL, position by position (5 standard errors)."""
    teacher_NV, logprobs_NV = distributions()
    draws = [
        threshold_teacher(teacher_NV, seed).kl_(logprobs_NV.clone(), slice(0, N), None).kl_C
        for seed in range(1, 801)
    ]
    values_SN = torch.stack(draws)
    error_N = values_SN.mean(0) - full_kl(teacher_NV, logprobs_NV)
    standard_error_N = values_SN.std(0) / len(draws) ** 0.5
    assert bool((error_N.abs() < 5 * standard_error_N + 1e-4).all())
    assert bool((values_SN < 0).any())


def test_top_k_is_a_lower_bound_that_rises_to_the_full_kl() -> None:
    teacher_NV, logprobs_NV = distributions()
    full_N = full_kl(teacher_NV, logprobs_NV)
    values = [
        top_k_teacher(teacher_NV, k).kl_(logprobs_NV.clone(), slice(0, N), None).kl_C
        for k in (1, 4, 16, 64, V)
    ]
    for less, more in pairwise(values):
        assert bool((less <= more + 1e-4).all())
    assert bool((values[0] >= -1e-6).all())
    torch.testing.assert_close(values[-1], full_N, rtol=1e-4, atol=1e-4)


def test_weight_mixes_kl_and_cross_entropy() -> None:
    teacher_NV, _ = distributions()
    hidden_ND, head = torch.randn(N, 9), StudentHead(torch.randn(V, 9))
    next_N = torch.randint(V, (N,))
    losses = {
        weight: chunked_loss(
            hidden_ND, head, Kd(next_N, top_k_teacher(teacher_NV, K), weight), dtype=torch.float32
        )
        for weight in (0.25, 1.0)
    }
    sums = losses[0.25].sums
    mixed = 0.25 * float(sums["kl"]) + 0.75 * float(sums["cross_entropy"])
    assert float(losses[0.25].loss) == pytest.approx(mixed, rel=1e-6)
    assert float(losses[1.0].loss) == pytest.approx(float(sums["kl"]), rel=1e-6)


def test_agreement_counts_positions_where_the_teacher_is_known() -> None:
    teacher_NV, logprobs_NV = distributions()
    teacher = threshold_teacher(teacher_NV, 1)
    flat_N = torch.arange(N) % 3 == 0
    unsure = ThresholdTeacher(
        teacher.token_ids_NK,
        teacher.weights_NK,
        torch.where(flat_N, 0, teacher.num_head_N),
        teacher.entropies_N,
    )
    sums_S = Scores(torch.zeros(N, dtype=torch.int64), unsure).reduce_(
        logprobs_NV.clone(), slice(0, N), with_grad=False
    )
    known_N = unsure.num_head_N > 0
    same_N = logprobs_NV.argmax(1) == teacher_NV.argmax(1)
    assert sums_S[2:].tolist() == [0.0, float((same_N & known_N).sum()), float(known_N.sum())]


def test_every_objective_of_a_recipe_names_tables_that_there_are() -> None:
    """Each can be made by its name alone; an abstract method left out would refuse that."""
    configs = [objective() for objective in get_args(get_args(ObjectiveConfig)[0])]
    assert len({config.loss for config in configs}) == len(configs) >= 8
    known = {name for name, _ in TABLES}
    assert {name for config in configs for name in config.reads.data} <= known
    assert {name for config in configs for name in config.reads.lm_data} <= known
