"""Ids that no token uses: what a student is trained on is a float64 distribution without them.

Dimensions: N = positions, V = rows of the teacher, K = kept entries.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.distribution import quantise_sticks, uniforms
from stages.models.causal_lm.language_head import LanguageHead
from stages.signals.scoring.encoding import measure, threshold_sample, top_k
from stages.student.batches.pairs import AdpaCollator
from stages.student.batches.signals import Collator, EncodingName
from stages.student.losses.advantage import ExactSupport, support_of
from stages.student.losses.kl import ExactTeacher, Kd, Teacher, teacher_of
from tests.fixtures.cached_data import tau_row

N, V, K, NUM_TOKENS = 9, 120, 12, 101
STUDENT_ROWS = (101, 104, 120, 131)  # no padding, some, the teacher's, more


def teacher_logits(padding: float) -> Tensor:
    """[N, V] float64; ``padding`` is added to the logits of the ids beyond the tokens."""
    generator = torch.Generator().manual_seed(1)
    logits_NV = 2 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    logits_NV[:, NUM_TOKENS:] += padding
    return logits_NV


def student_logprobs(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(N, rows, generator=generator, dtype=torch.float64)
    return logits.requires_grad_()


def without_padding(logits_NV: Tensor) -> Tensor:
    """What is to be learned: q, by its definition."""
    probs_NV = logits_NV.softmax(1)[:, :NUM_TOKENS]
    return probs_NV / probs_NV.sum(1, keepdim=True)


def row_of(logits_NV: Tensor, encoding: str, seed: int = 0) -> dict[str, Any]:
    """One document's row, as the stage would write it."""
    next_N = torch.arange(N)
    measured = measure(logits_NV.float(), next_N)
    row: dict[str, Any] = {
        "sample_id": "a",
        "input_ids_T": np.arange(N + 1),
        "first_target": 1,
        "next_token_logprobs_P": measured.next_token_logprobs_P.numpy(),
        "entropies_P": measured.entropies_P.numpy(),
    }
    if encoding == "top_k":
        kept = top_k(measured, k=K)
        return row | {
            "token_ids_PK": kept.token_ids_PK.numpy(),
            "logprobs_PK": kept.logprobs_PK.numpy().astype(np.float16),
            "rest_logprobs_P": kept.rest_logprobs_P.numpy().astype(np.float16),
        }
    if encoding == "threshold_tau":
        return row | asdict(tau_row(f"seed {seed}", 1, next_N, measured))
    draws_NK = uniforms(seed, N, K + 1)
    sample = threshold_sample(measured, torch.from_numpy(draws_NK[:, 0].copy()), k=K)
    codes_NK = quantise_sticks(sample.fractions_PK.numpy(), draws_NK[:, 1:])
    num_head_N = sample.num_head_P.numpy()
    return row | {
        "token_ids_PK": sample.token_ids_PK.numpy(),
        "num_head_P": num_head_N.astype(np.uint8),
        "head_codes_E": codes_NK[np.arange(K) < num_head_N[:, None]],
    }


def decoded(row: dict[str, Any], encoding: EncodingName) -> Teacher:
    """What the trainer makes of it, for a student that has no padding row."""
    return teacher_of(Collator(encoding, NUM_TOKENS, NUM_TOKENS)([row]), None)


def exact_teacher(logits_NV: Tensor) -> ExactTeacher:
    head = LanguageHead(logits_NV.T.contiguous(), None, 1.0, None, torch.float64, NUM_TOKENS)
    # Entropies of the whole distribution: not those of what is learned.
    return ExactTeacher(torch.eye(N, dtype=torch.float64), torch.full((N,), 99.0), head)


def kd(teacher: Teacher, logits: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL and dropped mass, summed, and the gradient of the loss, with targets of id 0."""
    work = logits.detach().log_softmax(1)
    objective = Kd(torch.zeros(N, dtype=torch.int64), teacher, weight)
    sums = objective.reduce_(work, slice(0, N), with_grad=True)
    return sums[2], sums[3], work


def expected_gradient(logits: Tensor, loss_of_kl: Tensor, weight: float) -> Tensor:
    cross_entropy = -logits.log_softmax(1)[:, 0].sum()
    total = weight * loss_of_kl + (1 - weight) * cross_entropy
    return torch.autograd.grad(total, logits)[0]


def full_kl(q_NV: Tensor, logits: Tensor) -> Tensor:
    return (q_NV * (q_NV.log() - logits.log_softmax(1)[:, :NUM_TOKENS])).sum()


@pytest.mark.parametrize("rows", STUDENT_ROWS)
def test_exact_is_the_distribution_without_them(rows: int) -> None:
    """A student's own padding counts in its softmax, where the teacher has nothing."""
    logits_NV, logits = teacher_logits(1.0), student_logprobs(rows)
    q_NV = without_padding(logits_NV)
    kl, dropped, gradient = kd(exact_teacher(logits_NV), logits, 0.7)
    torch.testing.assert_close(kl, full_kl(q_NV, logits).detach())
    lost = logits_NV.softmax(1)[:, NUM_TOKENS:].sum()
    assert 1.0 < float(lost) < N - 1
    torch.testing.assert_close(dropped, lost)
    wanted = expected_gradient(logits, full_kl(q_NV, logits), 0.7)
    torch.testing.assert_close(gradient, wanted)
    assert (gradient[:, NUM_TOKENS:] > 0).all()  # padding of the student is pushed down
    top_N = exact_teacher(logits_NV).top_token_ids(slice(0, N))
    assert top_N.tolist() == q_NV.argmax(1).tolist()


@pytest.mark.parametrize("rows", STUDENT_ROWS)
def test_top_k_is_the_buckets_of_the_distribution_without_them(rows: int) -> None:
    """All of the padding that has any mass is among the kept."""
    logits_NV, logits = teacher_logits(-torch.inf), student_logprobs(rows)
    logits_NV[:, 110] = logits_NV[:, :NUM_TOKENS].amax(1) + torch.linspace(-1, 1, N)
    logits_NV[::2, 119] = logits_NV[::2, 110]
    q_NV = without_padding(logits_NV)
    row = row_of(logits_NV, "top_k")
    ids_NK = torch.from_numpy(row["token_ids_PK"])
    kept_NV = torch.zeros(N, V, dtype=torch.bool).scatter_(1, ids_NK, True)[:, :NUM_TOKENS]
    s = logits.log_softmax(1)
    in_kept = torch.zeros(N, rows, dtype=torch.bool)
    in_kept[:, :NUM_TOKENS] = kept_NV
    rest_q_N = (q_NV * ~kept_NV).sum(1)
    rest_s_N = (s.exp() * ~in_kept).sum(1)
    inside_NV = torch.where(kept_NV, q_NV * (q_NV.log() - s[:, :NUM_TOKENS]), 0.0)
    buckets = inside_NV.sum() + (rest_q_N * (rest_q_N / rest_s_N).log()).sum()
    teacher = decoded(row, "top_k")
    kl, dropped, gradient = kd(teacher, logits, 0.7)
    # log-probs are stored in float16
    torch.testing.assert_close(kl, buckets.detach(), atol=0.02, rtol=2e-3)
    wanted = expected_gradient(logits, buckets, 0.7)
    torch.testing.assert_close(gradient, wanted, atol=2e-3, rtol=0)
    lost = float(logits_NV.softmax(1)[:, NUM_TOKENS:].sum())
    assert float(dropped) == pytest.approx(lost, rel=1e-3) and lost > 1.0
    assert teacher.top_token_ids(slice(0, N)).tolist() == q_NV.argmax(1).tolist()


@pytest.mark.parametrize("encoding", ["threshold", "threshold_tau"])
@pytest.mark.parametrize("rows", STUDENT_ROWS)
@pytest.mark.slow
def test_threshold_shares_out_what_it_drops(rows: int, encoding: EncodingName) -> None:
    """Over many draws the mean is the cross-entropy to the distribution without padding ids."""
    logits_NV, logits = teacher_logits(-1.0), student_logprobs(rows)
    q_NV = without_padding(logits_NV)
    found, below, dropped, gradients = [], [], [], []
    for seed in range(300):
        teacher = decoded(row_of(logits_NV, encoding, seed), encoding)
        weights_NK = teacher.weights_NK  # type: ignore[attr-defined]
        torch.testing.assert_close(weights_NK.sum(1), torch.ones(N))
        kl, lost, gradient = kd(teacher, logits, 1.0)
        entropies_N = teacher.entropies_N  # type: ignore[attr-defined]
        found.append(float(kl + entropies_N.sum()) / N)
        below.append(float(kl) / N)
        dropped.append(float(lost))
        gradients.append(gradient)
    error = np.std(found) / np.sqrt(len(found))
    expected = float(full_kl(q_NV, logits.detach())) / N
    cross_entropy = expected - float((q_NV * q_NV.log()).sum()) / N
    assert abs(np.mean(found) - cross_entropy) < 4 * error + 0.005
    share = float(logits_NV.softmax(1)[:, NUM_TOKENS:].sum())
    assert np.mean(dropped) == pytest.approx(share, rel=0.1) and share / N > 0.03
    assert expected - 3 * share / N < np.mean(below) < expected + 0.01
    wanted = expected_gradient(logits, full_kl(q_NV, logits), 1.0)
    off = (torch.stack(gradients).mean(0) - wanted).abs().max()
    spread = torch.stack(gradients).std(0).max() / np.sqrt(len(found))
    assert float(off) < 5 * float(spread)


@pytest.mark.parametrize("encoding", ["threshold", "threshold_tau", "top_k"])
def test_a_position_with_nothing_left_teaches_nothing(encoding: EncodingName) -> None:
    """Nearly all of one position's mass lies on padding; the text still counts there."""
    logits_NV = teacher_logits(0.0)
    logits_NV[3, NUM_TOKENS:] += 60.0
    teacher = decoded(row_of(logits_NV, encoding), encoding)
    logits = student_logprobs(NUM_TOKENS)
    _, dropped, gradient = kd(teacher, logits, 0.7)
    position = logits.detach()[3].softmax(0)
    torch.testing.assert_close(gradient[3, 1:], 0.3 * position[1:])
    torch.testing.assert_close(gradient[3, 0], 0.3 * (position[0] - 1))
    assert float(dropped) >= 1.0 and torch.isfinite(gradient).all()


def test_top_k_of_every_token_has_no_rest() -> None:
    """Then the rest was padding, and a student without padding has nothing to give it."""
    logits_NV = teacher_logits(-30.0)
    measured = measure(logits_NV.float(), torch.arange(N))
    kept = top_k(measured, k=NUM_TOKENS + 3)
    row = row_of(logits_NV, "top_k") | {
        "token_ids_PK": kept.token_ids_PK.numpy(),
        "logprobs_PK": kept.logprobs_PK.numpy(),
        "rest_logprobs_P": kept.rest_logprobs_P.numpy(),
    }
    logits = student_logprobs(NUM_TOKENS)
    kl, _, _ = kd(decoded(row, "top_k"), logits, 1.0)
    expected = full_kl(without_padding(logits_NV), logits).detach()
    torch.testing.assert_close(kl, expected, atol=0.01, rtol=2e-3)


def test_without_padding_nothing_is_dropped_and_no_number_moves() -> None:
    encodings: tuple[EncodingName, ...] = ("threshold", "threshold_tau", "top_k")
    for encoding in encodings:
        row = row_of(teacher_logits(0.0), encoding)
        plain, told = (Collator(encoding, V, n)([row]) for n in (None, V))
        assert plain.keys() == told.keys() and float(plain["dropped_N"].sum()) == 0.0
        assert all(torch.equal(plain[name], told[name]) for name in plain)


def test_advantages_of_padding_ids_are_left_out() -> None:
    """A student without those rows: the sum over kept tokens that it has."""
    rng = np.random.default_rng(0)
    ids_PK = rng.permuted(np.tile(np.arange(V), (N, 1)), axis=1)[:, :K]
    values_PK = rng.normal(size=(N, K)).astype(np.float16)
    row = {"sample_id": "a", "token_ids_PK": ids_PK, "advantages_PK": values_PK}
    logits = student_logprobs(NUM_TOKENS)
    probs = logits.detach().softmax(1).numpy()
    for union in (False, True):
        rest_P = rng.normal(size=N).astype(np.float16) if union else np.zeros(N)
        if union:
            row = {
                "sample_id": "a",
                "num_entries_P": np.full(N, K, np.uint16),
                "token_ids_E": ids_PK.reshape(-1),
                "advantages_E": values_PK.reshape(-1),
                "rest_advantages_P": rest_P,
            }
        batch = AdpaCollator(NUM_TOKENS, 1.0, NUM_TOKENS)._advantages([row])
        support = support_of(batch, None, clipped=False)
        work = logits.detach().log_softmax(1)
        found_C = support.expected_(work, slice(0, N), with_grad=False)
        dense = np.tile(rest_P.astype(np.float64)[:, None], (1, V))
        np.put_along_axis(dense, ids_PK, values_PK.astype(np.float64), axis=1)
        expected_P = (probs * dense[:, :NUM_TOKENS]).sum(1)
        np.testing.assert_allclose(found_C.numpy(), expected_P, atol=1e-6)


@pytest.mark.parametrize("rows", STUDENT_ROWS)
def test_exact_advantages_of_two_heights_are_those_of_the_tokens(rows: int) -> None:
    """Aligned teacher of 120 rows, reference of 104."""
    aligned_NV, reference_NV = teacher_logits(1.0), 0.5 * teacher_logits(2.0)[:, :104]
    heads = tuple(
        LanguageHead(logits.T.contiguous(), None, 1.0, None, torch.float64, NUM_TOKENS)
        for logits in (aligned_NV, reference_NV)
    )
    eye = torch.eye(N, dtype=torch.float64)
    logits = student_logprobs(rows)
    work = logits.detach().log_softmax(1)
    support = ExactSupport(eye, eye, heads, 0.3)  # type: ignore[arg-type]
    found_C = support.expected_(work, slice(0, N), with_grad=True)
    dense = 0.3 * (without_padding(aligned_NV).log() - without_padding(reference_NV).log())
    expected_C = (logits.softmax(1)[:, :NUM_TOKENS] * dense).sum(1)
    torch.testing.assert_close(found_C, expected_C.detach())
    torch.testing.assert_close(work, -torch.autograd.grad(expected_C.sum(), logits)[0])
