"""Exports with an entry for each token: what their trainers make of them is our loss.

axolotl 0.19 and DistillKit 1.0 pin other versions of TRL than ours, so neither installs here. What
they compute is restated from their source, and held in float64 to our own objectives and to
transformers' logits.

Dimensions: T = tokens of a row, N = scored positions, K = kept tokens, V = vocabulary, D = width.
"""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from pipeline.exports import distillkit
from pipeline.exports.export import export_tables
from pipeline.exports.token_aligned import IMPOSSIBLE, token_aligned
from schemas.dataset import open_dataset
from stages.models.causal_lm.language_head import LanguageHead
from stages.student.batches.signals import Collator, encoding_of
from stages.student.batches.top_k_rows import TopKRow
from stages.student.losses.step import Step
from stages.student.objectives.kd import KdConfig
from tests.fixtures.cached_data import VOCAB_SIZE, CachedData, make_cached_data

F64 = torch.float64
HARD, SOFT = 0.3, 0.7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def student(data: CachedData) -> Any:
    return LlamaForCausalLM.from_pretrained(data.student, dtype=F64).eval()


def our_kd(student: Any, tables: list[Path], weight: float) -> Tensor:
    """Our objective's mean over the scored positions of the held-out rows."""
    dataset = open_dataset(tables, split="heldout")
    encoding = encoding_of(dataset)
    rows = [dataset[index] for index in range(len(dataset))]
    batch = Collator(encoding, VOCAB_SIZE)(rows)
    head = LanguageHead.load(tables[1], device="cpu") if encoding == "exact" else None
    step = Step(
        model=student,
        bare=student,
        dtype=F64,
        teacher_head=head,
        lm_teacher_head=None,
        micro_batch_tokens=200,
        progress=0.0,
    )
    (term,) = KdConfig(weight=weight).terms(batch, step)
    return term.weight * term.total / len(batch["positions_N"])


def exported_rows(tables: list[Path], to: str, folder: Path, k: int | None) -> list[Any]:
    export_tables(tables, to, folder, split="heldout", k=k)
    return list(datasets.load_from_disk(str(folder / "heldout")).with_format("torch"))


def assert_same(student: Any, theirs: Tensor, ours: Tensor, rel: float) -> None:
    assert theirs.item() == pytest.approx(ours.item(), rel=rel)
    parameters = list(student.parameters())
    grads = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (theirs, ours))
    for their, our in zip(*grads, strict=True):
        torch.testing.assert_close(their, our, rtol=rel, atol=rel * our.abs().max().item())


def axolotl_loss(student: Any, rows: list[Any], *, normalize_topk: bool) -> Tensor:
    """By axolotl's ``kernels/liger.py`` and ``trainer.py`` (067b021, 0.19), temperature 1, beta 0.

    Labels move one to the left, teacher columns stay; the student is made to sum to one over the K
    tokens if ``kd_normalize_topk``; sums over masked entries and labels are divided by the number
    of labels.
    """
    soft = hard = torch.zeros((), dtype=F64)
    num_labels = 0
    for row in rows:
        logits_TV = student(input_ids=row["input_ids"][None]).logits[0]
        labels_T = torch.cat([row["labels"][1:], torch.tensor([-100])])
        hard = hard + torch.nn.functional.cross_entropy(
            logits_TV, labels_T, ignore_index=-100, reduction="sum"
        )
        num_labels += int((row["labels"] != -100).sum())
        own_TK = logits_TV.log_softmax(-1).gather(-1, row["target_token_ids"].long())
        if normalize_topk:
            own_TK = own_TK.log_softmax(-1)
        kept = row["target_mask"].bool()
        target_N = row["target_logprobs"].double()[kept]
        soft = soft + (target_N.exp() * (target_N - own_TK[kept])).sum()
    return (SOFT * soft + HARD * hard) / num_labels


@pytest.mark.parametrize("normalize_topk", [True, False])
def test_axolotls_loss_on_every_token_is_our_kd(
    data: CachedData, student: Any, tmp_path: Path, normalize_topk: bool
) -> None:
    """With K the whole vocabulary nothing is lost: value and gradients to 1e-4 of ours."""
    tables = data.tables("exact")
    rows = exported_rows(tables, "axolotl", tmp_path / "out", VOCAB_SIZE)
    theirs = axolotl_loss(student, rows, normalize_topk=normalize_topk)
    assert_same(student, theirs, our_kd(student, tables, SOFT), rel=1e-4)


def test_axolotls_loss_on_a_top_k_is_kl_within_it(
    data: CachedData, student: Any, tmp_path: Path
) -> None:
    """Both sides made to sum to one over the teacher's own top 8, from plain float64 passes."""
    rows = exported_rows(data.tables("top_k"), "axolotl", tmp_path / "out", None)
    teacher = LlamaForCausalLM.from_pretrained(data.teacher, dtype=F64).eval()
    losses, num_labels = [], 0
    for row in rows:
        ids_T = row["input_ids"]
        with torch.no_grad():
            target_PK, top_PK = teacher(input_ids=ids_T[None]).logits[0, :-1].topk(8, dim=-1)
        own_PV = student(input_ids=ids_T[None]).logits[0, :-1]
        target_PK = target_PK.log_softmax(-1)
        own_PK = own_PV.gather(-1, top_PK).log_softmax(-1)
        losses.append(SOFT * (target_PK.exp() * (target_PK - own_PK)).sum())
        losses.append(HARD * torch.nn.functional.cross_entropy(own_PV, ids_T[1:], reduction="sum"))
        num_labels += len(ids_T) - 1
    wanted = torch.stack(losses).sum() / num_labels
    theirs = axolotl_loss(student, rows, normalize_topk=True)
    assert theirs.item() == pytest.approx(wanted.item(), rel=1e-3)


def test_axolotls_columns_are_numbers_of_one_length(data: CachedData, tmp_path: Path) -> None:
    rows = exported_rows(data.tables("top_k"), "axolotl", tmp_path / "out", 3)
    for row in rows:
        length = len(row["input_ids"])
        assert set(row) == {
            *("input_ids", "attention_mask", "labels"),
            *("target_token_ids", "target_logprobs", "target_mask"),
        }
        for name, column in row.items():
            assert column.shape == ((length, 3) if name.startswith("target") else (length,))
        assert row["attention_mask"].tolist() == [1] * length
        assert row["target_mask"].tolist() == [[1] * 3] * (length - 1) + [[0] * 3]
        sums_P = row["target_logprobs"][:-1].exp().sum(-1)
        torch.testing.assert_close(sums_P, torch.ones(length - 1))


def distillkit_loss(student: Any, rows: list[Any], missing: str) -> Tensor:
    """By the rules of DistillKit 1.0 (``lossfuncs/kl.py``, ``common.py``), temperature 1.

    Entry t is compared with the logits at t wherever ``labels`` is not negative. ``zero`` makes the
    teacher sum to one over the K tokens, ``symmetric_uniform`` adds the rest of both as a bucket.
    """
    loss, num_entries = torch.zeros((), dtype=F64), 0
    for row in rows:
        logits_TV = student(input_ids=row["input_ids"][None]).logits[0]
        own_TK = logits_TV.log_softmax(-1).gather(-1, row["token_ids"].long())
        target_TK = row["top_values"].double()
        if missing == "zero":
            target_TK = target_TK.log_softmax(-1)
        kl_T = (target_TK.exp() * (target_TK - own_TK)).sum(-1)
        if missing == "symmetric_uniform":
            own_T, rest_T = (
                torch.log1p(-each.exp().sum(-1).clamp(1e-8, 1 - 1e-8))
                for each in (own_TK, target_TK)
            )
            kl_T = kl_T + rest_T.exp() * (rest_T - own_T)
        mask_T = row["labels"] >= 0
        loss, num_entries = loss + (kl_T * mask_T).sum(), num_entries + int(mask_T.sum())
    return loss / num_entries


def test_distillkits_loss_with_the_rest_is_our_kd(
    data: CachedData, student: Any, tmp_path: Path
) -> None:
    """Its ``symmetric_uniform`` is our K + 1 buckets: to 2e-3, as ours divides out float16."""
    tables = data.tables("top_k")
    rows = exported_rows(tables, "distillkit", tmp_path / "out", None)
    theirs = distillkit_loss(student, rows, "symmetric_uniform")
    assert_same(student, theirs, our_kd(student, tables, 1.0), rel=2e-3)


def test_distillkits_loss_on_every_token_is_our_kd(
    data: CachedData, student: Any, tmp_path: Path
) -> None:
    tables = data.tables("exact")
    rows = exported_rows(tables, "distillkit", tmp_path / "out", VOCAB_SIZE)
    theirs = distillkit_loss(student, rows, "zero")
    assert_same(student, theirs, our_kd(student, tables, 1.0), rel=1e-4)


def test_distillkits_labels_are_where_entries_are(data: CachedData, tmp_path: Path) -> None:
    rows = exported_rows(data.tables("top_k"), "distillkit", tmp_path / "out", 3)
    documents = open_dataset([data.documents], split="heldout")
    for index, row in enumerate(rows):
        ids = documents[index]["input_ids_T"].tolist()[:-1]
        assert set(row) == {"input_ids", "labels", "token_ids", "top_values"}
        assert row["input_ids"].tolist() == row["labels"].tolist() == ids
        assert row["token_ids"].shape == row["top_values"].shape == (len(ids), 3)
    spans = TopKRow(
        sample_id="",
        input_ids_T=np.array([9, 8, 7, 6, 5], np.int32),
        targets_P=np.array([2, 4]),
        token_ids_PK=np.array([[7], [5]], np.int32),
        logprobs_PK=np.zeros((2, 1), np.float32),
        rest_logprobs_P=np.full(2, -np.inf, np.float32),
    )
    ids, labels, tokens, _ = (column.to_pylist()[0] for column in distillkit._columns([spans]))
    assert ids == [9, 8, 7, 6] and labels == [-100, 8, -100, 6]
    assert tokens == [[0], [7], [0], [5]]


def test_an_entry_lies_at_the_token_before_the_one_it_is_about() -> None:
    """Two spans, and a token of probability 0, whose log-prob would make a loss no number."""
    row = TopKRow(
        sample_id="",
        input_ids_T=np.array([9, 8, 7, 6, 5, 4], np.int32),
        targets_P=np.array([2, 5]),
        token_ids_PK=np.array([[7, 3], [4, 2]], np.int32),
        logprobs_PK=np.array([[-0.1, -3.0], [0.0, -np.inf]], np.float32),
        rest_logprobs_P=np.array([-4.0, -np.inf], np.float32),
    )
    ids_TK, logprobs_TK, mask_TK = token_aligned(row)
    assert ids_TK.tolist() == [[0, 0], [7, 3], [0, 0], [0, 0], [4, 2], [0, 0]]
    assert mask_TK.tolist() == [[0, 0], [1, 1], [0, 0], [0, 0], [1, 0], [0, 0]]
    assert logprobs_TK[4].tolist() == [0.0, IMPOSSIBLE] and np.exp(np.float32(IMPOSSIBLE)) == 0
    assert row.labels_T.tolist() == [-100, -100, 7, -100, -100, 4]
