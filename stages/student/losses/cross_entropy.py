"""Next-token cross-entropy: ``-log s(next token)``, in nats; gradient ``s - one_hot(next)``.

With ``weights_N`` a position's loss and gradient are multiplied by its own weight.

Dimensions: N = scored positions, C = positions of one chunk, V = vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """The objective over all scored positions of a batch."""

    SUMS: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy")

    next_token_ids_N: Tensor
    weights_N: Tensor | None = None

    @property
    def extra_blocks(self) -> int:
        """None: all is done in place."""
        return 0

    def reduce_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Return the sums of ``SUMS``; see ``chunked_loss.PositionLoss``."""
        next_C1 = self.next_token_ids_N[rows, None]
        total = -weighted(logprobs_CV.gather(1, next_C1)[:, 0], self.weights_N, rows).sum()
        if with_grad:
            add_one_hot_(logprobs_CV.exp_(), next_C1, -1.0)
            weigh_gradient_(logprobs_CV, self.weights_N, rows)
        return torch.stack([total, total])


def weighted(values_C: Tensor, weights_N: Tensor | None, rows: slice) -> Tensor:
    """Return a chunk's values times the weights of its positions, if there are any."""
    return values_C if weights_N is None else values_C * weights_N[rows]


def weigh_gradient_(grad_CV: Tensor, weights_N: Tensor | None, rows: slice) -> None:
    """Multiply each position's gradient by its weight, if there are any."""
    if weights_N is not None:
        grad_CV.mul_(weights_N[rows, None])


def add_one_hot_(values_CV: Tensor, token_ids_C1: Tensor, amount: float) -> None:
    """Add ``amount`` at one token of each position."""
    amounts_C1 = values_CV.new_full(token_ids_C1.shape, amount)
    values_CV.scatter_add_(1, token_ids_C1, amounts_C1)
