"""What models say of whole responses: sums of log-probs, and how far two models are apart.

Entry j of a response belongs to the hidden state at ``len(prompt) - 1 + j``. No gradient: call in
eval and inference mode. Prompts go some at a time, those of like lengths together, and no [T, V]
block of logits is ever made, but one of a chunk of positions.

Dimensions: B = rows of a batch, T = tokens, P = response positions of a batch, C = those of one
chunk, V = vocabulary, D = hidden width, N = responses to one prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.models.causal_lm.chunked_loss import StudentHead, chunked_loss
from stages.models.causal_lm.model import final_hidden_states, last_layer_of, student_head
from stages.models.causal_lm.sequence_logprobs import Continuations, continuation_logprobs

Array = npt.NDArray[Any]
F64Array = npt.NDArray[np.float64]


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of ``lengths``, longest first: what does not fit memory fails at once."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(lengths), batch_size):
        yield longest_first[start : start + batch_size]


def without_repeats(responses: Sequence[Array]) -> tuple[list[Array], list[int]]:
    """Return the responses of different tokens, and where each one given lies among those.

    Scored once, equal ones cannot differ by the last bits of a sum, whatever the device.
    """
    places: dict[bytes, int] = {}
    kept: list[Array] = []
    given = []
    for response in responses:
        key = np.asarray(response, np.int64).tobytes()
        if key not in places:
            places[key] = len(kept)
            kept.append(response)
        given.append(places[key])
    return kept, given


def response_logprobs(
    model: PreTrainedModel, asked: Sequence[Continuations], *, batch_size: int
) -> list[F64Array]:
    """Return for each prompt [N] sums of log p over its responses' tokens, nats."""
    found: dict[int, F64Array] = {}
    lengths = [len(item.prompt_T) + int(np.max(item.lengths_N)) for item in asked]
    for batch in batches_by_length(lengths, batch_size):
        items = [asked[index] for index in batch]
        sums = continuation_logprobs(model, items).double().cpu().numpy()
        bounds = np.cumsum([len(item.lengths_N) for item in items])[:-1]
        found.update(zip(batch, np.split(sums, bounds), strict=True))
    return [found[index] for index in range(len(asked))]


def mean_kl(
    model: PreTrainedModel,
    other: PreTrainedModel,
    sequences: Sequence[tuple[Array, Array]],
    *,
    batch_size: int,
    num_ids: int | None = None,
) -> float:
    """Return the mean over all positions of the responses of KL(model || other), nats.

    ``sequences`` are prompts with one response each, at least one position in all. The sum is over
    the whole vocabulary, which both models must share; with ``num_ids`` over the ids before it, of
    both distributions without the others.
    """
    total, num_positions = 0.0, 0
    lengths = [len(prompt_T) + len(response_T) for prompt_T, response_T in sequences]
    for batch in batches_by_length(lengths, batch_size):
        input_ids_BT, places_P = _padded([sequences[index] for index in batch])
        hidden_PD, other_PD = (
            _hidden(one, input_ids_BT, places_P).to(model.device) for one in (model, other)
        )
        objective = _KlToOther(other_PD, student_head(other), num_ids)
        found = chunked_loss(hidden_PD, student_head(model), objective, dtype=torch.float32)
        total += float(found.sums["kl"])
        num_positions += len(places_P)
    return total / num_positions


@dataclass(frozen=True, slots=True)
class _KlToOther:
    """KL from a model to another one, whose logits are made a chunk at a time too."""

    SUMS: ClassVar[tuple[str, ...]] = ("kl",)

    other_ND: Tensor
    head: StudentHead
    num_ids: int | None

    @property
    def extra_blocks(self) -> int:
        """The other model's logits and log-probs."""
        return 2

    def reduce_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Return the sum over the positions; see ``chunked_loss.PositionLoss``."""
        assert not with_grad, "an evaluation has no gradient"
        other_CV = self.head.logits(self.other_ND[rows])[:, : self.num_ids].log_softmax(dim=1)
        if self.num_ids is not None:
            logprobs_CV = logprobs_CV[:, : self.num_ids].log_softmax(dim=1)
        other_CV = torch.sub(logprobs_CV, other_CV, out=other_CV)
        kl_C: Tensor = torch.linalg.vecdot(logprobs_CV.exp_(), other_CV)
        return kl_C.sum()[None]


def _padded(sequences: Sequence[tuple[Array, Array]]) -> tuple[Tensor, Tensor]:
    """Return [B, T] ids padded on the right, and [P] places of what predicts the responses.

    The last token of a response is fed to nobody.
    """
    width = max(len(prompt_T) + len(response_T) - 1 for prompt_T, response_T in sequences)
    input_ids_BT = np.zeros((len(sequences), width), np.int64)
    places = []
    for b, (prompt_T, response_T) in enumerate(sequences):
        fed_T = np.concatenate([prompt_T, response_T[:-1]])
        input_ids_BT[b, : len(fed_T)] = fed_T
        places.append(b * width + len(prompt_T) - 1 + np.arange(len(response_T)))
    return torch.from_numpy(input_ids_BT), torch.from_numpy(np.concatenate(places))


def _hidden(model: PreTrainedModel, input_ids_BT: Tensor, places_P: Tensor) -> Tensor:
    hidden_BTD = final_hidden_states(
        model, input_ids_BT.to(model.device), last_layer=last_layer_of(model)
    )
    return hidden_BTD.flatten(0, 1).index_select(0, places_P.to(model.device))
