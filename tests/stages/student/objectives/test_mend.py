"""MEND: one batch against plain float64, cached against live, and what is refused.

Dimensions: P = scored positions, V = vocabulary.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.dataset import open_dataset
from schemas.errors import ConfigError, StoreError
from stages.models.causal_lm.language_head import LanguageHead
from stages.student.batches.demonstrations import DemonstrationsCollator
from stages.student.batches.signals import Collator, encoding_of
from stages.student.batches.step_rows import counts_of
from stages.student.distiller.distiller import load_distiller
from stages.student.distiller.reader import load_reader
from stages.student.losses.step import UNITS, Step
from stages.student.objectives.mend import MendConfig
from tests.fixtures.cached_data import VOCAB_SIZE
from tests.fixtures.demonstration_data import MendData, SlowMend, make_mend_data
from tests.fixtures.tiny_teacher import ENCODINGS

pytestmark = pytest.mark.slow

F64, CPU = torch.float64, torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> MendData:
    return make_mend_data(tmp_path_factory.mktemp("mend"), ENCODINGS)


def rows_of(data: MendData, source: str, encoding: str) -> list[dict[str, Any]]:
    dataset = open_dataset(data.tables(source, encoding), split="train")
    assert encoding_of(dataset) == encoding
    return [dataset[index] for index in (0, 1, 4)]


def one_batch(data: MendData, source: str, encoding: str, config: MendConfig) -> dict[str, Any]:
    """Loss, its parts and the distiller's gradients, by the product in float64."""
    rows = rows_of(data, source, encoding)
    signals = Collator(encoding, VOCAB_SIZE)  # type: ignore[arg-type]
    batch = DemonstrationsCollator(signals, needs_answers=config.answer_weight > 0)(rows)
    distiller = load_distiller(data.models.distiller, device=CPU).double()
    head = None
    if encoding.startswith("exact"):
        head = LanguageHead.load(data.root / f"{source}_{encoding}", device="cpu")
    step = Step(
        model=distiller,
        bare=distiller,
        dtype=F64,
        teacher_head=head,
        lm_teacher_head=None,
        micro_batch_tokens=60,
        progress=0.0,
        reader=load_reader(data.models.teacher, device=CPU, dtype=F64),
    )
    counts = dict(zip(UNITS, counts_of(batch), strict=True))
    terms = config.terms(batch, step)
    loss: Any = torch.stack([t.weight * t.total / counts[t.unit] for t in terms]).sum()
    loss.backward()
    sums = {name: value for term in terms for name, value in term.sums.items()}
    grads = {name: p.grad for name, p in distiller.named_parameters()}
    return {"rows": rows, "batch": batch, "head": head, "counts": counts} | {
        "loss": loss.detach(),
        "sums": sums,
        "grads": grads,
    }


def dense_teacher(batch: dict[str, Tensor], head: LanguageHead | None) -> Tensor:
    """[P, V] probabilities of what a batch holds (``top_k`` has a bucket, so no such thing)."""
    if head is not None:
        return head.logits(batch["hidden_ND"]).double().softmax(-1)
    probs_PV = torch.zeros(len(batch["positions_N"]), VOCAB_SIZE, dtype=F64)
    return probs_PV.scatter_add_(1, batch["token_ids_NK"].long(), batch["weights_NK"].double())


def assert_gradients(found: dict[str, Any], slow: SlowMend, *, rel: float) -> None:
    assert set(found) == set(slow.weights)
    for name, weight in slow.weights.items():
        assert weight.grad is not None
        error = (found[name] - weight.grad).abs().max() / weight.grad.abs().max()
        assert float(error) < rel, name


@pytest.mark.parametrize("encoding", ["threshold", "exact"])
@pytest.mark.parametrize(
    ("source", "config"),
    [
        ("documents", MendConfig(answer_weight=0.0)),
        ("episodes", MendConfig(answer_weight=0.7, kl_weight=1.3)),
    ],
)
def test_one_batch_matches_the_dense_loss(
    data: MendData, source: str, config: MendConfig, encoding: str
) -> None:
    """KL a mean over query positions of the batch, cross-entropy over its answer tokens."""
    found = one_batch(data, source, encoding, config)
    slow, made = SlowMend(data.models), data.rows(source)
    rows = [made[row["sample_id"]] for row in found["rows"]]
    own_PV = torch.cat([slow.logprobs(row) for row in rows])
    teacher_PV = dense_teacher(found["batch"], found["head"])
    kl = -(teacher_PV * own_PV).sum() - found["batch"]["entropies_N"].double().sum()
    assert float(found["sums"]["kl"]) == pytest.approx(kl.item(), rel=1e-6)
    assert found["counts"]["tokens"] == len(own_PV)
    loss = config.kl_weight * kl / len(own_PV)
    if config.answer_weight:
        hard = []
        for row in rows:
            answer = torch.from_numpy(np.asarray(row.input_ids_T[row.answer_start :], np.int64))
            logprobs_AV = slow.logprobs(row)[-len(answer) :]
            hard.append(-logprobs_AV.gather(1, answer[:, None])[:, 0])
        answers = torch.cat(hard)
        assert found["counts"]["answer_tokens"] == len(answers)
        total = float(found["sums"]["answer_cross_entropy"])
        assert total == pytest.approx(answers.sum().item(), rel=1e-9)
        loss = loss + config.answer_weight * answers.mean()
    backward: Any = loss
    backward.backward()
    assert float(found["loss"]) == pytest.approx(loss.item(), rel=1e-6)
    assert_gradients(found["grads"], slow, rel=1e-5)


def test_the_cached_teacher_is_the_live_one(data: MendData) -> None:
    """Exact encoding, whose hidden states and entropies have 11 significant bits."""
    config = MendConfig()
    found = one_batch(data, "episodes", "exact", config)
    slow, made = SlowMend(data.models), data.rows("episodes")
    kl, hard = [], []
    for row in (made[one["sample_id"]] for one in found["rows"]):
        own_PV, teacher_PV = slow.logprobs(row), slow.teacher(row)
        kl.append((teacher_PV.exp() * (teacher_PV - own_PV)).sum(-1))
        answer = torch.from_numpy(np.asarray(row.input_ids_T[row.answer_start :], np.int64))
        hard.append(-own_PV[-len(answer) :].gather(1, answer[:, None])[:, 0])
    loss: Any = torch.cat(kl).mean() + torch.cat(hard).mean()
    loss.backward()
    assert float(found["loss"]) == pytest.approx(loss.item(), rel=3e-4)
    assert_gradients(found["grads"], slow, rel=2e-3)


def test_top_k_is_a_lower_bound(data: MendData) -> None:
    config = MendConfig(answer_weight=0.0)
    bound, whole = (one_batch(data, "documents", kind, config) for kind in ("top_k", "exact"))
    assert 0 < float(bound["loss"]) < float(whole["loss"])


def test_a_batch_is_about_the_tokens_the_teacher_was_asked_about(data: MendData) -> None:
    """Teacher and distiller read other demonstrations; the query's tokens are the same ones."""
    rows, made = rows_of(data, "episodes", "exact"), data.rows("episodes")
    assert any(
        row["num_teacher_demonstrations"] > row["num_distiller_demonstrations"] for row in rows
    )
    batch = DemonstrationsCollator(Collator("exact", VOCAB_SIZE))(rows)
    width = batch["input_ids"].shape[1]
    at = 0
    for b, row in enumerate(made[one["sample_id"]] for one in rows):
        query = row.input_ids_T[row.query_start :].tolist()
        assert batch["input_ids"][b, : len(query)].tolist() == query
        end = at + len(query) - 1
        assert batch["next_token_ids_N"][at:end].tolist() == query[1:]
        assert batch["positions_N"][at:end].tolist() == [b * width + j for j in range(end - at)]
        num_answer = len(row.input_ids_T) - row.answer_start
        assert batch["in_answer_N"][at:end].sum() == num_answer
        assert batch["in_answer_N"][end - num_answer : end].all()
        at = end
    assert at == len(batch["hidden_ND"])


def test_rows_that_cannot_be_learnt_are_refused(data: MendData) -> None:
    row = rows_of(data, "documents", "exact")[0]
    signals = Collator("exact", VOCAB_SIZE)
    with pytest.raises(ConfigError, match=r"has no answer, .* set it to 0, or train on episodes"):
        DemonstrationsCollator(signals, needs_answers=True)([row])
    moved = row | {"first_target": row["first_target"] + 1}
    with pytest.raises(StoreError, match=r"the row's spans have \d+ from"):
        DemonstrationsCollator(signals)([moved])
    strange = row | {"distiller_ids_L": np.array([VOCAB_SIZE])}
    with pytest.raises(StoreError, match=f"distiller_ids_L holds id {VOCAB_SIZE}"):
        DemonstrationsCollator(signals)([strange])


def test_the_teacher_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match="kl_weight"):
        MendConfig(kl_weight=0.0)


def test_both_splits_have_rows(data: MendData) -> None:
    for source in ("documents", "episodes"):
        for split in ("train", "heldout"):
            assert len(open_dataset(data.tables(source, "exact"), split=split)) > 2
