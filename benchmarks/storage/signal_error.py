"""What a cached distribution does to a student: errors against the full one, on real positions.

With p the teacher, s the student and q what a reader of the cache gets, the student minimises
``-sum_v q_v log s_v``. Measured against ``-sum_v p_v log s_v``:

- the error of that number at a position, and of its mean over a row of 512 tokens;
- the error of its gradient with respect to the final hidden states, ``W^T (s - p)``, over all
  positions as one vector: relative error |g_q - g_p| / |g_p| and cosine;
- the same of the gradient with respect to the logits *summed over a batch* of rows, which is that
  of an output bias: here noise averages out and bias does not, as in a parameter's gradient.

Where q keeps the mass of the rest as one bucket (``rest="bucket"``), the loss is the cross-entropy
over K + 1 buckets; its value is compared after taking off the entropy of each teacher, so that the
bucket's missing entropy is not counted against it. With ``rest="uniform"`` the rest is spread
evenly over the other tokens; with ``rest="nothing"`` it is nowhere.

Dimensions: C = positions of a chunk, P = positions, K = kept entries, V = vocabulary, D = width.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Decoded:
    """K weighted tokens a position (distinct, or of weight zero), and the mass of the others."""

    token_ids_CK: Tensor
    weights_CK: Tensor
    rest_C: Tensor
    rest: Literal["nothing", "bucket", "uniform"] = "nothing"


class Taught:
    """Positions as the teacher sees them: what all students share."""

    def __init__(self, logprobs_CV: Tensor) -> None:
        """Take the teacher's log-probs."""
        self.logprobs_CV, self.probs_CV = logprobs_CV, logprobs_CV.exp()
        self.entropy_C = -torch.linalg.vecdot(self.probs_CV, logprobs_CV)
        self.p_sum_V = self.probs_CV.sum(0)


class Chunk:
    """Positions with a teacher and a student, and what every scheme's error needs of them."""

    def __init__(self, taught: Taught, student_CV: Tensor, weight_VD: Tensor) -> None:
        """Take the student's log-probs; ``weight_VD`` is its head."""
        self.taught, self.student_CV, self.weight_VD = taught, student_CV, weight_VD
        self.s_CV = student_CV.exp()
        self.loss_C = -torch.linalg.vecdot(taught.probs_CV, student_CV)
        self.p_hidden_CD = taught.probs_CV @ weight_VD
        self.s_hidden_CD = self.s_CV @ weight_VD
        self.s_sum_V = self.s_CV.sum(0)

    def reference(self) -> tuple[Tensor, Tensor]:
        """Return the full gradient: by hidden states [C, D], by logits summed over positions."""
        return self.s_hidden_CD - self.p_hidden_CD, self.s_sum_V - self.taught.p_sum_V


@dataclass(frozen=True)
class ChunkError:
    """Loss error [C] in nats and gradient errors, by hidden states [C, D] and by logits [V]."""

    loss_C: Tensor
    hidden_CD: Tensor
    logits_V: Tensor


def sparse_error(chunk: Chunk, decoded: Decoded, weight_sum_D: Tensor) -> ChunkError:
    """Return the errors of a sparse scheme; ``weight_sum_D`` is the head summed over V.

    Written as q = sum_k w_k 1[v = k] + even + scale s_v, so that nothing dense is built for it.
    """
    ids_CK, vocab_size = decoded.token_ids_CK, chunk.s_CV.shape[1]
    kept_CK, s_kept_CK = chunk.student_CV.gather(1, ids_CK), chunk.s_CV.gather(1, ids_CK)
    even_C = scale_C = torch.zeros_like(decoded.rest_C)
    loss_C = -(decoded.weights_CK * kept_CK).sum(1)
    excess_C = -chunk.loss_C
    if decoded.rest == "bucket":
        s_rest_C = (1.0 - s_kept_CK.double().sum(1)).clamp(min=1e-12).float()
        scale_C = decoded.rest_C / s_rest_C
        loss_C = loss_C - decoded.rest_C * s_rest_C.log()
        coarse_C = -torch.xlogy(decoded.weights_CK, decoded.weights_CK).sum(1)
        excess_C = excess_C + chunk.taught.entropy_C - coarse_C
        excess_C = excess_C + torch.xlogy(decoded.rest_C, decoded.rest_C)
    elif decoded.rest == "uniform":
        even_C = decoded.rest_C / (vocab_size - ids_CK.shape[1])
        loss_C = loss_C - even_C * (chunk.student_CV.sum(1) - kept_CK.sum(1))
    extra_CK = decoded.weights_CK - even_C[:, None] - scale_C[:, None] * s_kept_CK
    mass_C = decoded.weights_CK.sum(1)
    surplus_C = (mass_C if decoded.rest == "nothing" else mass_C + decoded.rest_C) - 1.0
    student_C = surplus_C - scale_C
    hidden_CD = functional.embedding_bag(
        ids_CK, chunk.weight_VD, per_sample_weights=extra_CK, mode="sum"
    )
    hidden_CD = chunk.p_hidden_CD - hidden_CD - even_C[:, None] * weight_sum_D
    logits_V = chunk.taught.p_sum_V - even_C.sum()
    logits_V.index_add_(0, ids_CK.reshape(-1), -extra_CK.reshape(-1))
    if bool((student_C.abs() > 1e-5).any()):
        hidden_CD += student_C[:, None] * chunk.s_hidden_CD
        logits_V += student_C @ chunk.s_CV
    return ChunkError(loss_C + excess_C, hidden_CD, logits_V)


def dense_error(chunk: Chunk, decoded_CV: Tensor) -> ChunkError:
    """Return the errors of a scheme that gives the whole distribution."""
    loss_C = -torch.linalg.vecdot(decoded_CV, chunk.student_CV) - chunk.loss_C
    difference_CV = chunk.taught.probs_CV - decoded_CV
    return ChunkError(loss_C, difference_CV @ chunk.weight_VD, difference_CV.sum(0))


def divergences(taught: Taught, decoded: Decoded) -> Tensor:
    """Return KL(p || q) [C] of a scheme whose rest is spread uniformly over the other tokens."""
    others = taught.probs_CV.shape[1] - decoded.token_ids_CK.shape[1]
    p_kept_CK = taught.probs_CV.gather(1, decoded.token_ids_CK)
    p_rest_C = (1.0 - p_kept_CK.double().sum(1)).clamp(min=0.0).float()
    log_even_C = (decoded.rest_C / others).clamp(min=1e-30).log()
    cross_C = -torch.xlogy(p_kept_CK, decoded.weights_CK).sum(1) - p_rest_C * log_even_C
    divergence_C: Tensor = cross_C - taught.entropy_C
    return divergence_C


@dataclass
class Comparison:
    """Sums over the pieces of a gradient: of error^2, error x reference and reference^2."""

    error: float = 0.0
    product: float = 0.0
    reference: float = 0.0

    def add(self, error: Tensor, reference: Tensor) -> None:
        """Count one more piece of the vector."""
        error_N, reference_N = error.reshape(-1), reference.reshape(-1)
        self.error += float(error_N @ error_N)
        self.product += float(error_N @ reference_N)
        self.reference += float(reference_N @ reference_N)

    @property
    def relative_error(self) -> float:
        """|error| / |reference|."""
        return float((self.error / self.reference) ** 0.5)

    @property
    def cosine(self) -> float:
        """The cosine of the angle between the reference and it plus the error."""
        square = self.reference + 2 * self.product + self.error
        return float((self.reference + self.product) / (square * self.reference) ** 0.5)


@dataclass
class SchemeError:
    """Errors of one scheme against one student, over rows and batches of rows."""

    losses: list[Tensor] = field(default_factory=list)
    row_means: list[float] = field(default_factory=list)
    hidden: Comparison = field(default_factory=Comparison)
    batch_logits: Comparison = field(default_factory=Comparison)

    def figures(self) -> dict[str, float]:
        """All of it as columns of a table."""
        loss_P, mean_R = torch.cat(self.losses).double(), torch.tensor(self.row_means).double()
        return {
            "loss_error_mean_abs": float(loss_P.abs().mean()),
            "loss_error_rms": float(loss_P.square().mean().sqrt()),
            "loss_bias": float(loss_P.mean()),
            "row_error_mean_abs": float(mean_R.abs().mean()),
            "row_error_rms": float(mean_R.square().mean().sqrt()),
            "hidden_gradient_error": self.hidden.relative_error,
            "hidden_gradient_cosine": self.hidden.cosine,
            "batch_gradient_error": self.batch_logits.relative_error,
            "batch_gradient_cosine": self.batch_logits.cosine,
        }
