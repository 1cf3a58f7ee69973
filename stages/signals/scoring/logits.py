"""Logits of many positions, a block at a time, and log-probs of chosen tokens.

Dimensions: P = positions of a block, R = states, M = tokens asked about, V = vocabulary,
D = hidden width.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.models.causal_lm.language_head import LanguageHead
from stages.models.engines.sequences import TokenIds
from stages.signals.scoring.encoding import MAX_BLOCK_BYTES
from stages.stage import Later

Made = TypeVar("Made")
F64Array = npt.NDArray[np.float64]
# A product of 256 positions takes 0.89 ms of a core a position (SmolLM2), of 128 1.14, of 512 0.89.
_CPU_BLOCK_POSITIONS = 256


class LogitBlocks:
    """Logits a block of positions at a time, on a CPU always in the same memory.

    A block made anew costs a core 0.1 ms a position in pages that the kernel has to clear.
    """

    def __init__(self, head: LanguageHead) -> None:
        """Set the memory of one block aside."""
        self.head = head
        self.positions = positions_per_block(head)
        self._out_PV: Tensor | None = None
        if head.weight_VD.device.type == "cpu":
            self._out_PV = torch.empty(self.positions, head.vocab_size)

    def of(self, hidden_PD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield where each block begins, and its logits: use them before the next."""
        for start in range(0, len(hidden_PD), self.positions):
            block_PD = hidden_PD[start : start + self.positions]
            yield start, self.head.logits(block_PD, out_PV=self._out_PV)

    def later(self, hidden_PD: Tensor, make: Callable[[Tensor], Made]) -> Made | Later:
        """Return what ``make`` makes of the states with this head: on a GPU, as a ``Later``.

        On a CPU it is made at once: the head has no other cores there than the engine's.
        """
        if self.head.weight_VD.device.type == "cpu":
            return make(hidden_PD)
        return Later(lambda: make(hidden_PD), hidden_PD.nbytes)


def positions_per_block(head: LanguageHead) -> int:
    """Return how many positions' logits are made at a time."""
    most = head.positions_per_chunk(MAX_BLOCK_BYTES)
    return min(most, _CPU_BLOCK_POSITIONS) if head.weight_VD.device.type == "cpu" else most


def logprobs_of(
    head: LanguageHead, hidden_RD: Tensor, rows_M: npt.NDArray[np.int64], token_ids_M: TokenIds
) -> F64Array:
    """Return log p(token m | state rows_M[m]) [M] in nats; logits are made in blocks of states."""
    logprobs_M = np.empty(len(rows_M), np.float64)
    step = positions_per_block(head)
    for start in range(0, len(hidden_RD), step):
        logprobs_PV = head.logits(hidden_RD[start : start + step]).log_softmax(dim=-1)
        inside_M = (rows_M >= start) & (rows_M < start + step)
        rows = torch.from_numpy(rows_M[inside_M] - start).to(logprobs_PV.device)
        ids = torch.from_numpy(token_ids_M[inside_M].astype(np.int64)).to(logprobs_PV.device)
        logprobs_M[inside_M] = logprobs_PV[rows, ids].double().cpu().numpy()
    return logprobs_M
