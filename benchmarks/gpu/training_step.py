"""A training step of a 0.5 B student: with a cached teacher, with a live one of 4 B, and with none.

Models of random weights in the shapes of Qwen2.5-0.5B and Qwen3-4B, 8 rows of 1,024 tokens. A step
is what the product's trainer does: its objectives and its chunked loss, forward in bfloat16 of
float32 weights, backward, clipping, AdamW; the batch comes from pinned host memory. Reading and
decoding of the cache are not in it: a loader's workers do them meanwhile.

The live teacher is as cheap as one can be: its forward in bfloat16 gives hidden states alone, whose
head and KL are the product's ``exact`` objective, a chunk of positions at a time.

Dimensions: B = rows, T = tokens, N = scored positions, V = vocabulary, K = kept entries.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3Config

from benchmarks.bars import at_most
from benchmarks.gpu.card import Card
from benchmarks.gpu.report import Report, gigabytes
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.causal_lm.model import last_layer_of, scored_hidden_states, student_head
from stages.student.losses.step import Step
from stages.student.objectives.cross_entropy import CrossEntropyConfig
from stages.student.objectives.kd import KdConfig
from stages.student.objectives.objective import Objective

PART = "training step"
K, KD_WEIGHT = 16, 0.9
CHECKED = 64  # tokens of the row that is compared with float64
MOST_ERROR, MOST_ERROR_BFLOAT16 = 1e-3, 2e-2  # relative; of loss and gradients; of the loss
PLAIN, CACHED, LIVE = "cross-entropy alone", "cached teacher", "live teacher"
Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Size:
    """Both models and the batch."""

    student: PretrainedConfig
    teacher: PretrainedConfig
    rows: int
    length: int


def full() -> Size:
    """0.49 B and 4.0 B parameters."""
    student = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4_864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    teacher = Qwen3Config(
        vocab_size=151_936, hidden_size=2_560, intermediate_size=9_728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    return Size(student, teacher, rows=8, length=1_024)


def tiny() -> Size:
    """Two layers each."""
    student = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    teacher = Qwen3Config(
        vocab_size=512, hidden_size=96, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, tie_word_embeddings=True,
    )  # fmt: skip
    return Size(student, teacher, rows=2, length=64)


def run(report: Report, *, quick: bool) -> None:
    """Measure the three; the teacher is loaded last, and is in no other's memory."""
    size, card = tiny() if quick else full(), report.card
    student = _model(size.student, card, torch.float32)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=card.is_gpu)
    setting = Setting(report, student, optimizer, size)
    report.attempt(PLAIN, lambda: setting.measure(PLAIN, CrossEntropyConfig()))
    report.attempt(CACHED, lambda: setting.measure(CACHED, KdConfig(weight=KD_WEIGHT)))
    report.attempt(LIVE, lambda: setting.measure_live(KdConfig(weight=KD_WEIGHT)))
    for name, other in ((CACHED, PLAIN), (LIVE, CACHED)):
        if name in setting.seconds and other in setting.seconds:
            ratio = setting.seconds[name] / setting.seconds[other]
            report.row(what=f"{name} over {other}", times=ratio)
    report.save()


def _model(config: PretrainedConfig, card: Card, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with card.device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.train()


Extra = Callable[[Batch], Batch]  # what a live teacher adds to a batch on the device


class Setting:
    """The student, its optimizer and the batch, which all three share."""

    def __init__(self, report: Report, student: Any, optimizer: Any, size: Size) -> None:
        """Draw the batch."""
        self.report, self.card = report, report.card
        self.student, self.optimizer, self.size = student, optimizer, size
        self.seconds: dict[str, float] = {}
        self.batch = _batch(size.rows, size.length, size.student.vocab_size)
        if self.card.is_gpu:
            self.batch = {name: values.pin_memory() for name, values in self.batch.items()}

    def measure_live(self, objective: Objective) -> None:
        """Load the teacher and measure with it."""
        teacher = _model(self.size.teacher, self.card, torch.bfloat16).eval()
        weight_VD = student_head(teacher).weight_VD.detach()
        held = torch.bfloat16 if self.card.is_gpu else torch.float32  # as LanguageHead holds it
        head = LanguageHead(weight_VD.to(held), None, 1.0, None, torch.bfloat16)

        def extra(batch: Batch) -> Batch:
            with torch.no_grad():
                hidden_ND = scored_hidden_states(teacher, batch, last_layer=last_layer_of(teacher))
            return {"hidden_ND": hidden_ND, "entropies_N": torch.zeros_like(hidden_ND[:, 0])}

        self.measure(LIVE, objective, extra=extra, head=head)

    def measure(
        self,
        name: str,
        objective: Objective,
        *,
        extra: Extra | None = None,
        head: LanguageHead | None = None,
    ) -> None:
        """Check the loss of one short row, then measure steps."""

        def loss(student: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
            device = self.card.device
            batch = {key: each.to(device, non_blocking=True) for key, each in batch.items()}
            if extra is not None:
                batch = _without_cache(batch) | extra(batch)
            step = Step(student, student, dtype, head, None, 8_192, 0.0)
            narrow = dtype == torch.bfloat16
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow):
                (term,) = objective.terms(batch, step)
            return term.total / len(batch["positions_N"])

        errors = self._errors(name, loss, extra, head)

        def step() -> None:
            loss(self.student, self.batch, torch.bfloat16).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        step()  # the optimizer's own state is there from now on
        peak = self.card.peak_bytes(step)
        times = self.card.timed(step)
        self.seconds[name] = times.median
        tokens = len(self.batch["positions_N"]) / times.median
        columns = {"tokens/s": tokens, "GB": gigabytes(peak), **errors}
        self.report.row(what=name, **times.row(), **columns)

    def _errors(
        self,
        name: str,
        loss: Callable[[Any, Batch, torch.dtype], Tensor],
        extra: Extra | None,
        head: LanguageHead | None,
    ) -> dict[str, float]:
        """Compare a short row's loss and gradients in float32, and loss in bfloat16, with float64.

        Of a live teacher the hidden states are taken as they are.
        """
        batch = _batch(1, CHECKED, self.size.student.vocab_size)
        on_card = {key: each.to(self.card.device) for key, each in batch.items()}
        wide = copy.deepcopy(self.student).double()
        hidden_ND = None if extra is None else extra(on_card)["hidden_ND"]
        expected = dense_loss(wide, on_card, name, hidden_ND, head)
        parameters = list(self.student.parameters())
        wanted = torch.autograd.grad(expected, list(wide.parameters()))
        single = loss(self.student, batch, torch.float32)
        found = torch.autograd.grad(single, parameters)
        squares = [
            ((a.double() - b).square().sum(), b.square().sum())
            for a, b in zip(found, wanted, strict=True)
        ]
        off, whole = (torch.stack(column).sum() for column in zip(*squares, strict=True))
        with torch.no_grad():
            narrow = loss(self.student, batch, torch.bfloat16)
        reference = float(expected.detach())
        errors = {
            "loss off": abs(float(single.detach()) / reference - 1),
            "gradients off": float((off / whole).sqrt()),
            "bfloat16 loss off": abs(float(narrow) / reference - 1),
        }
        float32 = max(errors["loss off"], errors["gradients off"])
        self.report.bar(at_most(f"{name}, float32 off float64", float32, MOST_ERROR))
        bfloat16 = errors["bfloat16 loss off"]
        self.report.bar(at_most(f"{name}, bfloat16 off float64", bfloat16, MOST_ERROR_BFLOAT16))
        return errors


def _batch(rows: int, length: int, vocab_size: int) -> Batch:
    """Return what the product's collator makes of rows with a ``threshold`` table."""
    generator = torch.Generator().manual_seed(rows)
    ids_BT = torch.randint(vocab_size, (rows, length), generator=generator)
    places_BT = torch.arange(rows * length).view(rows, length)
    count, apart = rows * (length - 1), vocab_size // K
    weights_NK = torch.randn(count, K, generator=generator).mul_(2.0).softmax(1)
    drawn_NK = torch.randint(apart, (count, K), generator=generator) + apart * torch.arange(K)
    return {
        "input_ids": ids_BT,
        "positions_N": places_BT[:, :-1].flatten(),
        "next_token_ids_N": ids_BT[:, 1:].flatten(),
        "token_ids_NK": drawn_NK.int(),
        "weights_NK": weights_NK,
        "num_head_N": torch.full((count,), K, dtype=torch.uint8),
        "entropies_N": torch.special.entr(weights_NK).sum(1),
        "dropped_N": torch.zeros(count),
    }


def _without_cache(batch: Batch) -> Batch:
    names = ("input_ids", "positions_N", "next_token_ids_N")
    return {name: batch[name] for name in names}


def dense_loss(
    student: Any, batch: Batch, name: str, hidden_ND: Tensor | None, head: LanguageHead | None
) -> Tensor:
    """Return the mean loss from its definition, of all log-probs [N, V] of the model's own logits.

    Less the entropy of a live teacher, as the step leaves it out.
    """
    logprobs_BTV = student(input_ids=batch["input_ids"], use_cache=False).logits.log_softmax(-1)
    logprobs_NV = logprobs_BTV.flatten(0, 1)[batch["positions_N"]]
    next_N = logprobs_NV.gather(1, batch["next_token_ids_N"][:, None])[:, 0]
    cross_entropy: Tensor = -next_N.mean()
    if name == PLAIN:
        return cross_entropy
    if hidden_ND is not None and head is not None:
        logits_NV = hidden_ND.to(head.dtype).double() @ head.weight_VD.double().T
        kl_N = -(logits_NV.softmax(-1) * logprobs_NV).sum(1)
    else:
        weights_NK = batch["weights_NK"].double()
        kept_NK = logprobs_NV.gather(1, batch["token_ids_NK"].long())
        kl_N = (torch.xlogy(weights_NK, weights_NK) - weights_NK * kept_NK).sum(1)
    kl: Tensor = kl_N.mean()
    return KD_WEIGHT * kl + (1 - KD_WEIGHT) * cross_entropy
