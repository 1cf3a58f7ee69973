"""How good a student is on held-out rows, against the text and against the cached teacher.

All means are over scored tokens, in nats. ``kl_to_teacher`` is exact for ``exact``, an unbiased
estimate for ``threshold`` and a lower bound for ``top_k``, so compare numbers of one table only.
``top1_agreement`` counts the positions where the cache tells the teacher's likeliest token.
``dropped_mass`` is what the teacher gives to ids that no token uses: its distribution is taken
without (``stages.student.losses.kl``).
A distiller is measured by what its reader says of queries and answers after its vectors, and
``answer_cross_entropy`` is over the answers' tokens alone, where there are answers.
Of preference pairs the chosen responses are measured. Of a student's responses with the teacher's
log-probs of their tokens ``reverse_kl`` estimates KL(student || teacher) at the writer's prefixes,
and ``staleness`` how far the student is from the writer (``stages.student.losses.opd``).
Of aligned spans the tokens of the spans are measured:
``bits_per_byte`` is the sum of their cross-entropy over the bytes they are (a special token is
none), a number that students of different tokenizers can be compared by; ``teacher_bits_per_byte``
is the teacher's, of the same bytes in its own tokens.

Dimensions: N = scored positions, C = positions of one chunk, V = vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from schemas.dataset import CachedDataset, open_dataset
from schemas.storage.files import Folder
from schemas.tables.aligned_spans import ALIGNED_SPANS
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from schemas.tables.prompted.responses import RESPONSES
from stages.models.causal_lm.chunked_loss import PositionLoss, StudentHead, chunked_loss
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.causal_lm.model import (
    check_student,
    last_layer_of,
    load_student,
    scored_hidden_states,
    student_head,
    student_vocab_size,
)
from stages.models.checkpoints.tokenizer_identity import num_token_ids
from stages.models.encoder_decoder.halves import frame_of
from stages.student.batches.demonstrations import (
    Array,
    DemonstrationsCollator,
    distiller_tokens,
)
from stages.student.batches.pairs import ChosenCollator
from stages.student.batches.responses import OpdCollator
from stages.student.batches.several_datasets import SeveralDatasets
from stages.student.batches.signals import (
    Collator,
    Row,
    SignalRows,
    encoding_of,
    worker_errors_as_raised,
)
from stages.student.batches.spans import SpansCollator
from stages.student.batches.teachers import TAUGHT, on_device, taught_collator
from stages.student.batches.training_data import teacher_head_of
from stages.student.distiller.reader import read_scored_states
from stages.student.evaluate.by_row import RowScores, WithSampleIds
from stages.student.losses.cross_entropy import CrossEntropy
from stages.student.losses.kl import Teacher, teacher_of
from stages.student.losses.mixture import next_logprobs_of, of_each, taught_by
from stages.student.losses.opd import OnPolicyDistillation
from stages.student.options import TrainOptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DtypeName = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over positions that an evaluation reports; each one's first two go to ``each_N2``."""

    SUMS: ClassVar[tuple[str, ...]] = ("cross_entropy", "kl", "dropped", "agreed", "compared")

    next_token_ids_N: Tensor
    teacher: Teacher | None
    each_N2: Tensor | None = None

    @property
    def extra_blocks(self) -> int:
        """What the teacher's encoding makes."""
        return self.teacher.EXTRA_BLOCKS if self.teacher else 0

    def reduce_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Return the sums of ``SUMS``; see ``chunked_loss.PositionLoss``."""
        assert not with_grad, "an evaluation has no gradient"
        next_C = logprobs_CV.gather(1, self.next_token_ids_N[rows, None])[:, 0]
        cross_entropy = -next_C.sum()
        if self.each_N2 is not None:
            self.each_N2[rows, 0] = -next_C
        if self.teacher is None:
            return torch.stack([cross_entropy, *cross_entropy.new_zeros(4)])
        teacher_C = self.teacher.top_token_ids(rows)
        agreed = (logprobs_CV.argmax(dim=1) == teacher_C).sum()
        kl_C, dropped_C = self.teacher.kl_(logprobs_CV, rows, None)
        if self.each_N2 is not None:
            self.each_N2[rows, 1] = kl_C
        counts = torch.stack([agreed, (teacher_C >= 0).sum()]).to(kl_C)
        return torch.stack([cross_entropy, kl_C.sum(), dropped_C.sum().to(kl_C), *counts])


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows to evaluate on, and the part of them that this process takes; a distiller's reader.

    Ids from ``num_token_ids`` on are no token's (None: not known). ``rows`` are the indices of
    those that count (None: all), ``tokens_of`` a row what a distiller reads. ``together`` all
    processes run the student equally often, as one that is divided over them has to be. Of several
    teachers ``teacher_heads`` are by their table's place in the data, and ``mixture`` is that of
    objective ``kd``. ``by_row`` takes in rows one by one: of one teacher or none, each a batch's.
    """

    dataset: CachedDataset
    teacher_head: LanguageHead | None
    options: TrainOptions
    dtype: DtypeName
    rank: int = 0
    world_size: int = 1
    num_token_ids: int | None = None
    reader: PreTrainedModel | None = None
    rows: Sequence[int] | None = None
    together: bool = False
    tokens_of: Callable[[Row], Array] = distiller_tokens
    teacher_heads: Mapping[int, LanguageHead] = field(default_factory=dict)
    mixture: Any = None
    by_row: RowScores | None = None


def evaluate(
    student: Path,
    data: Sequence[Folder],
    *,
    split: str = "heldout",
    batch_size: int = 8,
    dtype: DtypeName = "float32",
    options: TrainOptions | None = None,
    by_row: RowScores | None = None,
) -> dict[str, float]:
    """Measure a student on one split, and into ``by_row`` each row; raises what training would."""
    options = replace(options or TrainOptions(), eval_batch_size=batch_size)
    device = device_of(options)
    dataset = open_dataset(data, split=split, verify=options.verify)
    model = load_student(student, device=device)
    check_student(student, dataset, student_vocab_size(model))
    held_out = held_out_of(dataset, student, device, options, dtype)
    if dataset.manifests[0].table != RESPONSES.name:
        held_out = replace(held_out, by_row=by_row)
    return measure_student(model, held_out)


def held_out_of(
    dataset: CachedDataset,
    student: Path,
    device: torch.device,
    options: TrainOptions,
    dtype: DtypeName,
) -> HeldOut:
    """Return all rows of ``dataset`` for a student in a folder, one process to measure it."""
    known_ids = num_token_ids(student)
    head = teacher_head_of(dataset, device, known_ids)
    return HeldOut(dataset, head, options, dtype, num_token_ids=known_ids)


def device_of(options: TrainOptions) -> torch.device:
    """Return where to run: the GPU where there is one, unless told otherwise."""
    use_gpu = options.device == "auto" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def measure_student(model: PreTrainedModel, held_out: HeldOut) -> dict[str, float]:
    """Return the means of one pass over the rows, of all processes together."""
    training = model.training
    model.eval()
    sums = torch.zeros(13, dtype=torch.float64, device=model.device)
    # What a divided student gathers is used in training, too: no tensors of inference alone.
    without_grad = torch.no_grad() if held_out.together else torch.inference_mode()
    with without_grad, worker_errors_as_raised():
        for batch in _batches(model, held_out):
            sums += _sums_of(model, batch, held_out)
        for batch in _stand_ins(model, held_out):
            _sums_of(model, batch, held_out)
    model.train(training)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    scored = held_out.dataset.manifests[0].table == RESPONSES.name
    return _means(sums, has_teacher=bool(encoding_of(held_out.dataset)), is_scored=scored)


def _stand_ins(model: PreTrainedModel, held_out: HeldOut) -> Iterator[dict[str, Tensor]]:
    """Yield a batch, which does not count, for each that another process has more than this one."""
    if not held_out.together:
        return
    rows, size = _rows_of(held_out), held_out.options.eval_batch_size
    most, mine = (
        math.ceil(len(rows[rank :: held_out.world_size]) / size) for rank in (0, held_out.rank)
    )
    for _ in range(most - mine):
        yield from _batches(model, replace(held_out, rows=rows[:1], rank=0, world_size=1))


def _rows_of(held_out: HeldOut) -> Sequence[int]:
    return range(len(held_out.dataset)) if held_out.rows is None else held_out.rows


def _batches(model: PreTrainedModel, held_out: HeldOut) -> DataLoader[dict[str, Tensor]]:
    mine = _rows_of(held_out)[held_out.rank :: held_out.world_size]
    vocab_size = student_vocab_size(held_out.reader or model)
    encoding = encoding_of(held_out.dataset)
    collator: Any = Collator(encoding, vocab_size, held_out.num_token_ids)
    if isinstance(held_out.dataset, SeveralDatasets):
        tokens = Collator("", vocab_size)
        collator = taught_collator(held_out.dataset, tokens, held_out.num_token_ids)
    if held_out.reader is not None:
        frame = frame_of(held_out.reader.config)
        collator = DemonstrationsCollator(collator, tokens_of=held_out.tokens_of, frame=frame)
    elif held_out.dataset.manifests[0].table == PREFERENCE_PAIRS.name:
        collator = ChosenCollator(collator)
    elif held_out.dataset.manifests[0].table == RESPONSES.name:
        collator = OpdCollator.of(held_out.dataset, vocab_size)
    elif held_out.dataset.manifests[0].table == ALIGNED_SPANS.name:
        collator = SpansCollator(collator)
    if held_out.by_row is not None:
        collator = WithSampleIds(collator)
    return DataLoader(
        Subset(SignalRows(held_out.dataset), mine),  # type: ignore[arg-type]
        batch_size=held_out.options.eval_batch_size,
        collate_fn=collator,
        num_workers=held_out.options.num_workers,
    )


def _sums_of(model: PreTrainedModel, batch: dict[str, Tensor], held_out: HeldOut) -> Tensor:
    batch = on_device(batch, model.device)
    dtype = DTYPES[held_out.dtype]
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        hidden_ND = _hidden_states(model, batch, held_out)
    head = student_head(held_out.reader or model)
    each_N2 = None if held_out.by_row is None else hidden_ND.new_zeros(len(hidden_ND), 2)
    sums = chunked_loss(hidden_ND, head, _scores(batch, held_out, each_N2), dtype=dtype).sums
    if held_out.by_row is not None and each_N2 is not None:
        held_out.by_row.add(batch, each_N2, has_teacher=bool(encoding_of(held_out.dataset)))
    answers = _answer_sums(batch, hidden_ND, head, dtype)
    responses = _response_sums(batch, hidden_ND, head, dtype)
    teacher_ce = _teacher_cross_entropy(batch, held_out).to(hidden_ND)
    count = torch.tensor(float(len(hidden_ND)), device=model.device)
    of_spans = _span_sums(batch, hidden_ND)
    return torch.stack(
        [*sums.values(), teacher_ce, count, *answers, *responses, *of_spans]
    ).double()


def _scores(batch: dict[str, Any], held_out: HeldOut, each_N2: Tensor | None) -> PositionLoss:
    """Return what is summed over a batch's positions, each against its own teacher."""
    if TAUGHT in batch:
        heads, mixture = held_out.teacher_heads, held_out.mixture
        return of_each(
            batch, lambda columns, next_N: Scores(next_N, taught_by(columns, heads, mixture))
        )
    has_teacher = bool(encoding_of(held_out.dataset))
    teacher = teacher_of(batch, held_out.teacher_head) if has_teacher else None
    return Scores(batch["next_token_ids_N"], teacher, each_N2)


def _teacher_cross_entropy(batch: dict[str, Any], held_out: HeldOut) -> Tensor:
    """Return the sum of the teacher's, or its mixture's, over a batch; 0 without one."""
    if TAUGHT in batch:
        told = [next_logprobs_of(columns, held_out.mixture) for columns in batch[TAUGHT]]
        return -torch.cat(told).sum()
    if not encoding_of(held_out.dataset):
        return torch.zeros(())
    next_logprobs_N: Tensor = batch["teacher_next_logprobs_N"]
    return -next_logprobs_N.sum()


def _hidden_states(model: PreTrainedModel, batch: dict[str, Tensor], held_out: HeldOut) -> Tensor:
    """Return [N, D] of the student's scored positions, or of the reader's behind a distiller."""
    if held_out.reader is None:
        return scored_hidden_states(model, batch, last_layer=last_layer_of(model))
    return read_scored_states(model, held_out.reader, batch)


def _answer_sums(
    batch: dict[str, Tensor], hidden_ND: Tensor, head: StudentHead, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the sum of the answers' cross-entropy and their tokens; zeros without answers."""
    in_answer_N = batch.get("in_answer_N")
    if in_answer_N is None or not bool(in_answer_N.any()):
        return hidden_ND.new_zeros(()), hidden_ND.new_zeros(())
    scores = CrossEntropy(batch["next_token_ids_N"][in_answer_N])
    total = chunked_loss(hidden_ND[in_answer_N], head, scores, dtype=dtype).loss
    return total, in_answer_N.sum().to(total)


def _response_sums(
    batch: dict[str, Tensor], hidden_ND: Tensor, head: StudentHead, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the sums of reverse KL and staleness over sampled tokens; zeros without a writer."""
    if "writer_logprobs_N" not in batch:
        return hidden_ND.new_zeros(()), hidden_ND.new_zeros(())
    scores = OnPolicyDistillation(
        batch["next_token_ids_N"], batch["teacher_logprobs_N"], batch["writer_logprobs_N"]
    )
    sums = chunked_loss(hidden_ND, head, scores, dtype=dtype).sums
    return sums["reverse_kl"], sums["staleness"]


def _span_sums(batch: dict[str, Tensor], hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's log-prob of a batch's spans and their bytes; zeros without spans."""
    if "span_bytes_S" not in batch:
        return hidden_ND.new_zeros(()), hidden_ND.new_zeros(())
    return batch["span_logprobs_S"].sum(), batch["span_bytes_S"].sum().to(hidden_ND.dtype)


def _means(sums: Tensor, *, has_teacher: bool, is_scored: bool) -> dict[str, float]:
    cross_entropy, kl, dropped, agreed, compared, teacher_ce, count, *others = sums.tolist()
    answer_ce, answered, reverse_kl, staleness, span_logprob, num_bytes = others
    tokens = max(count, 1.0)
    mean = cross_entropy / tokens
    means = {
        "tokens": count,
        "cross_entropy": mean,
        "perplexity": math.exp(min(mean, 700.0)),  # a diverged student must not overflow a report
    }
    if answered:
        means["answer_cross_entropy"] = answer_ce / answered
    if is_scored:
        means |= {"reverse_kl": reverse_kl / tokens, "staleness": staleness / tokens}
    if num_bytes:
        bits = num_bytes * math.log(2.0)
        means["bits_per_byte"] = cross_entropy / bits
        means["teacher_bits_per_byte"] = -span_logprob / bits
    if has_teacher:
        means["kl_to_teacher"] = kl / tokens
        if not math.isnan(teacher_ce):  # of distributions that were imported it is not known
            means["teacher_cross_entropy"] = teacher_ce / tokens
        means["top1_agreement"] = agreed / max(compared, 1.0)
        means["dropped_mass"] = dropped / tokens
    return means
