"""The error measures of the storage benchmark against dense arithmetic and autograd.

Dimensions: C = positions, K = kept entries, V = vocabulary, D = hidden width.
"""

from typing import Literal

import pytest
import torch
from torch import Tensor

from benchmarks.storage.signal_error import (
    Chunk,
    Comparison,
    Decoded,
    Taught,
    dense_error,
    divergences,
    sparse_error,
)

C, K, V, D = 5, 4, 23, 7


@pytest.fixture
def setting() -> tuple[Tensor, Tensor, Tensor]:
    """Teacher log-probs [C, V], the student's final hidden states [C, D] and its head [V, D]."""
    generator = torch.Generator().manual_seed(0)
    logprobs_CV = (2 * torch.randn(C, V, generator=generator)).log_softmax(-1)
    hidden_CD = torch.randn(C, D, generator=generator)
    return logprobs_CV, hidden_CD, torch.randn(V, D, generator=generator)


def kept(logprobs_CV: Tensor, rest: Literal["nothing", "bucket", "uniform"]) -> Decoded:
    largest_CK, ids_CK = logprobs_CV.topk(K, dim=-1)
    weights_CK = largest_CK.exp()
    return Decoded(ids_CK, weights_CK, 1 - weights_CK.sum(1), rest)


def dense_of(decoded: Decoded) -> Tensor:
    """q [C, V] of a scheme whose rest does not depend on the student."""
    even_C = decoded.rest_C / (V - K) if decoded.rest == "uniform" else torch.zeros(C)
    dense_CV = even_C[:, None].expand(C, V).clone()
    return dense_CV.scatter_(1, decoded.token_ids_CK, decoded.weights_CK)


def loss_of(logits_CV: Tensor, decoded: Decoded) -> Tensor:
    """Return the loss [C] a trainer would minimise."""
    log_s_CV = logits_CV.log_softmax(-1)
    if decoded.rest != "bucket":
        return -(dense_of(decoded) * log_s_CV).sum(1)
    kept_CK = log_s_CV.gather(1, decoded.token_ids_CK)
    others_C = decoded.rest_C * (1 - kept_CK.exp().sum(1)).log()
    return -(decoded.weights_CK * kept_CK).sum(1) - others_C


@pytest.mark.parametrize("rest", ["nothing", "bucket", "uniform"])
def test_gradient_errors_are_those_of_autograd(
    setting: tuple[Tensor, Tensor, Tensor], rest: Literal["nothing", "bucket", "uniform"]
) -> None:
    logprobs_CV, hidden_CD, weight_VD = setting
    hidden_CD.requires_grad_()
    logits_CV = hidden_CD @ weight_VD.T
    chunk = Chunk(Taught(logprobs_CV), logits_CV.detach().log_softmax(-1), weight_VD)
    decoded = kept(logprobs_CV, rest)
    full = -(logprobs_CV.exp() * logits_CV.log_softmax(-1)).sum()
    of_full = torch.autograd.grad(full, [hidden_CD, logits_CV], retain_graph=True)
    of_scheme = torch.autograd.grad(loss_of(logits_CV, decoded).sum(), [hidden_CD, logits_CV])
    error = sparse_error(chunk, decoded, weight_VD.sum(0))
    torch.testing.assert_close(error.hidden_CD, of_scheme[0] - of_full[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        error.logits_V, (of_scheme[1] - of_full[1]).sum(0), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(chunk.reference()[0], of_full[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(chunk.reference()[1], of_full[1].sum(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rest", ["nothing", "uniform"])
def test_loss_error_is_that_of_the_dense_distribution(
    setting: tuple[Tensor, Tensor, Tensor], rest: Literal["nothing", "uniform"]
) -> None:
    logprobs_CV, hidden_CD, weight_VD = setting
    chunk = Chunk(Taught(logprobs_CV), (hidden_CD @ weight_VD.T).log_softmax(-1), weight_VD)
    decoded = kept(logprobs_CV, rest)
    sparse = sparse_error(chunk, decoded, weight_VD.sum(0))
    dense = dense_error(chunk, dense_of(decoded))
    torch.testing.assert_close(sparse.loss_C, dense.loss_C, atol=1e-5, rtol=1e-5)
    if rest == "uniform":
        torch.testing.assert_close(sparse.hidden_CD, dense.hidden_CD, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(sparse.logits_V, dense.logits_V, atol=1e-5, rtol=1e-4)


def test_loss_error_of_a_bucket_is_the_information_lost_inside_it(
    setting: tuple[Tensor, Tensor, Tensor],
) -> None:
    logprobs_CV, hidden_CD, weight_VD = setting
    student_CV = (hidden_CD @ weight_VD.T).log_softmax(-1)
    decoded = kept(logprobs_CV, "bucket")
    error = sparse_error(
        Chunk(Taught(logprobs_CV), student_CV, weight_VD), decoded, weight_VD.sum(0)
    )
    p_CV, s_CV = (
        log_CV.exp().scatter(1, decoded.token_ids_CK, 0) for log_CV in (logprobs_CV, student_CV)
    )
    inside_p_CV, inside_s_CV = (x / x.sum(1, keepdim=True) for x in (p_CV, s_CV))
    lost_C = decoded.rest_C * (
        torch.xlogy(inside_p_CV, inside_p_CV) - torch.xlogy(inside_p_CV, inside_s_CV)
    ).sum(1)
    torch.testing.assert_close(error.loss_C, -lost_C, atol=1e-5, rtol=1e-4)


def test_divergence_is_that_of_the_dense_distribution(
    setting: tuple[Tensor, Tensor, Tensor],
) -> None:
    logprobs_CV = setting[0]
    decoded = kept(logprobs_CV, "uniform")
    expected_C = (logprobs_CV.exp() * (logprobs_CV - dense_of(decoded).log())).sum(1)
    found_C = divergences(Taught(logprobs_CV), decoded)
    torch.testing.assert_close(found_C, expected_C, atol=1e-5, rtol=1e-4)


def test_comparison_over_pieces_is_that_of_the_whole_vector() -> None:
    reference, error = torch.randn(2, 60, generator=torch.Generator().manual_seed(3))
    comparison = Comparison()
    for start in range(0, 60, 25):
        comparison.add(error[start : start + 25], reference[start : start + 25])
    whole = torch.nn.functional.cosine_similarity(reference + error, reference, dim=0)
    assert comparison.relative_error == pytest.approx(float(error.norm() / reference.norm()))
    assert comparison.cosine == pytest.approx(float(whole), abs=1e-6)
