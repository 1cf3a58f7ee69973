"""One batch of one training step, as an objective sees it, and what it gives back.

An objective is a list of terms. Each is a sum with a gradient that is divided by the whole step's
count of its unit: scored tokens, samples (rows) or scored tokens of answers, over all accumulated
batches of all processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from stages.models.causal_lm.chunked_loss import PositionLoss, chunked_loss
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.causal_lm.model import last_layer_of, scored_hidden_states, student_head
from stages.models.causal_lm.sequence_logprobs import (
    Continuations,
    continuation_logprobs,
    gathered_logprobs,
)
from stages.student.distiller.reader import read_scored_states

Unit = Literal["tokens", "samples", "answer_tokens"]
UNITS: tuple[Unit, ...] = ("tokens", "samples", "answer_tokens")


@dataclass(frozen=True, slots=True)
class Term:
    """``weight * total / count of unit``; ``sums`` are plain numbers for the log, per unit too."""

    total: Tensor
    sums: Mapping[str, Tensor]
    unit: Unit
    weight: float = 1.0

    def without_effect(self) -> "Term":
        """Return the term of a stand-in: its gradient reaches every weight, and is zero."""
        sums = {name: value * 0.0 for name, value in self.sums.items()}
        return Term(self.total * 0.0, sums, self.unit, self.weight)


@dataclass(frozen=True, slots=True)
class Step:
    """The student and what a batch does not say.

    ``model`` may be wrapped by DDP, which must see one forward a batch, no more; all other forwards
    go through ``bare``. ``progress`` runs from 0 at the first step of the run to 1 at the last.
    ``teacher_heads`` are those of several tables, by their place in the data, ``teacher_head`` the
    first. With a ``reader`` the student is a distiller, and what is scored is what the reader says.
    """

    model: nn.Module
    bare: PreTrainedModel
    dtype: torch.dtype
    teacher_head: LanguageHead | None
    lm_teacher_head: LanguageHead | None
    micro_batch_tokens: int
    progress: float
    advantage_heads: tuple[LanguageHead, LanguageHead] | None = None
    reader: PreTrainedModel | None = None
    teacher_heads: Mapping[int, LanguageHead] = field(default_factory=dict)

    def over_positions(self, batch: dict[str, Any], objective: PositionLoss) -> Term:
        """Sum an objective over a batch's scored positions: the one forward of ``model``."""
        return self.over(self.hidden_states(batch), objective)

    def hidden_states(self, batch: dict[str, Any]) -> Tensor:
        """Return [N, D] of a batch's scored positions: the one forward of ``model``."""
        return scored_hidden_states(self.model, batch, last_layer=last_layer_of(self.bare))

    def read_states(self, batch: dict[str, Any]) -> Tensor:
        """Return [N, D] of the reader at the scored positions of a batch of queries.

        The one forward of ``model`` makes the vectors that the reader is fed before them.
        """
        assert self.reader is not None, "the objective uses a reader"
        return read_scored_states(self.model, self.reader, batch)

    def over(self, hidden_ND: Tensor, objective: PositionLoss, unit: Unit = "tokens") -> Term:
        """Sum an objective over some positions' hidden states."""
        head = student_head(self.reader or self.bare)
        result = chunked_loss(hidden_ND, head, objective, dtype=self.dtype)
        sums = {name: value for name, value in result.sums.items() if name != "loss"}
        return Term(result.loss, sums, unit)

    def logprobs_of(self, hidden_ND: Tensor, token_ids_N: Tensor) -> Tensor:
        """Return [N] log p of one token at each hidden state, without a gradient."""
        rows_N = torch.arange(len(hidden_ND), device=hidden_ND.device)
        head = student_head(self.reader or self.bare)
        with torch.no_grad():
            return gathered_logprobs(hidden_ND, head, rows_N, token_ids_N, dtype=self.dtype)

    def answer_logprobs(
        self, asked: list[Continuations], *, wrapped: bool = False
    ) -> tuple[Tensor, ...]:
        """Return for each prompt the sums of log p of its answers; ``wrapped`` as above."""
        logprobs: Any = continuation_logprobs(
            self.model if wrapped else self.bare,
            asked,
            dtype=self.dtype,
            micro_batch_tokens=self.micro_batch_tokens,
        )
        return tuple(logprobs.split([len(item.lengths_N) for item in asked]))
