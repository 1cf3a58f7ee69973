"""Likelihoods of spans: against dense float64 autograd, finite differences, and other losses.

Dimensions: N = positions, V = vocabulary, D = hidden width, S = spans.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from schemas.dataset import open_dataset
from schemas.errors import ConfigError, IdentityMismatch
from schemas.reference.span_losses import alm, span_sums
from stages.models.causal_lm.chunked_loss import StudentHead, chunked_loss
from stages.models.causal_lm.sequence_logprobs import gathered_logprobs
from stages.student.batches.signals import Collator
from stages.student.batches.spans import SpansCollator
from stages.student.evaluate.positions import evaluate
from stages.student.losses.cross_entropy import CrossEntropy
from stages.student.losses.spans import span_divergences, span_likelihoods
from stages.student.objectives.alm import AlmConfig
from stages.student.objectives.kd import KdConfig
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train
from tests.fixtures.cached_data import CachedData, make_cached_data, save_model, spans_table
from tests.fixtures.tokenizer_kinds import save_kind

N, V, D = 12, 17, 5
LENGTHS = (1, 3, 2, 1, 4, 1)
TEACHER = (-0.5, -7.25, -0.01, -20.0, -2.0, 0.0)
ENTRIES_WEIGHT = 0.7
TEMPERATURES = (1.0, 7.0, 100.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cached"))


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_batch() -> dict[str, Tensor]:
    return {
        "next_token_ids_N": torch.arange(N) * 5 % V,
        "span_of_N": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        "span_logprobs_S": torch.tensor(TEACHER),
    }


def entries() -> dict[str, Tensor]:
    """At the first positions of four spans; one has nothing left beside them, one an id twice."""
    first = torch.tensor([0, 1, 6, 11])
    ids = torch.zeros(N, 3, dtype=torch.int32)
    probs = torch.zeros(N, 3, dtype=torch.float64)
    ids[first] = torch.tensor([[3, 4, 5], [16, 0, 2], [7, 7, 7], [1, 2, 3]], dtype=torch.int32)
    mass = [[0.5, 0.25, 0.1], [0.9, 0.05, 0], [0.3, 0, 0], [0.5, 0.3, 0.2]]
    probs[first] = torch.tensor(mass, dtype=torch.float64)
    untaught_N = torch.ones(N, dtype=torch.bool)
    untaught_N[first] = False
    rest_N = torch.where(untaught_N, 0.0, 1 - probs.sum(1)).clamp(min=0)
    rest_N[11] = 0.0
    return {"token_ids_NK": ids, "probs_NK": probs, "rest_N": rest_N, "untaught_N": untaught_N}


def entries_kl(logprobs_NV: Tensor, batch: Any) -> Tensor:
    """Bucket by bucket, at each position that is taught."""
    total = logprobs_NV.new_zeros(())
    for n in (~batch["untaught_N"]).nonzero()[:, 0].tolist():
        rest = 1 - sum(logprobs_NV[n, v].exp() for v in set(batch["token_ids_NK"][n].tolist()))
        pairs = zip(batch["token_ids_NK"][n].tolist(), batch["probs_NK"][n].double(), strict=True)
        for v, p in pairs:
            if p > 0:
                total = total + p * (p.log() - logprobs_NV[n, v])
        r = batch["rest_N"][n].double()
        if r > 0:
            total = total + r * (r.log() - rest.log())  # type: ignore[union-attr]
    return total


def dense(hidden_ND: Tensor, weight_VD: Tensor, batch: Any, tau: float, weight: float) -> Tensor:
    """The equation in plain autograd, all [N, V] at once."""
    logprobs_NV = (hidden_ND @ weight_VD.T).log_softmax(-1)
    next_N = logprobs_NV[torch.arange(N), batch["next_token_ids_N"]]
    q_S = torch.stack([part.sum().div(tau).exp() for part in torch.split(next_N, list(LENGTHS))])
    p_S = (batch["span_logprobs_S"].double() / tau).exp()
    unsure = p_S < 1
    other = (1 - p_S[unsure]) * ((1 - p_S[unsure]) / (1 - q_S[unsure])).log()
    divergence = tau * ((p_S * (p_S / q_S).log()).sum() + other.sum())
    kl = entries_kl(logprobs_NV, batch) if "probs_NK" in batch else 0.0
    loss: Tensor = weight * divergence - (1 - weight) * next_N.sum() + ENTRIES_WEIGHT * kl
    return loss


def fused(
    hidden_ND: Tensor, weight_VD: Tensor, batch: Any, tau: float, weight: float, num_chunks: int
) -> Tensor:
    head = StudentHead(weight_VD)
    with torch.no_grad():
        logprobs_N = gathered_logprobs(
            hidden_ND, head, torch.arange(N), batch["next_token_ids_N"], dtype=torch.float64
        )
    settings = {"temperature": tau, "weight": weight}
    if "probs_NK" in batch:
        settings["entries_weight"] = ENTRIES_WEIGHT
    objective = span_likelihoods(batch, logprobs_N, **settings)
    rows = -(-N // num_chunks)
    chunk_bytes = rows * V * 8 * (2 + objective.extra_blocks)
    return chunked_loss(
        hidden_ND, head, objective, dtype=torch.float64, chunk_bytes=chunk_bytes
    ).loss


@pytest.mark.parametrize("with_entries", [False, True])
@pytest.mark.parametrize("num_chunks", [1, 5])
@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("tau", TEMPERATURES)
def test_loss_and_gradients_are_those_of_dense_autograd(
    tau: float, weight: float, num_chunks: int, with_entries: bool
) -> None:
    """Chunks cut spans anywhere: what a span adds does not depend on them."""
    batch = make_batch() | (entries() if with_entries else {})
    found: list[list[Tensor]] = []
    for loss_of in (dense, partial(fused, num_chunks=num_chunks)):
        hidden_ND = normal(N, D, seed=1).requires_grad_()
        weight_VD = normal(V, D, seed=2).requires_grad_()
        loss: Any = loss_of(hidden_ND, weight_VD, batch, tau, weight)
        loss.backward()
        assert hidden_ND.grad is not None and weight_VD.grad is not None
        found.append([loss.detach(), hidden_ND.grad, weight_VD.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tau", TEMPERATURES)
def test_gradient_is_a_finite_difference_of_the_numpy_equation(tau: float) -> None:
    """The reference knows logits alone: neither our softmax nor our derivative has a part in it."""
    batch = make_batch()
    hidden_ND, weight_VD = normal(N, D, seed=1), normal(V, D, seed=2)

    def reference(hidden: Tensor) -> float:
        logits_NV = (hidden @ weight_VD.T).numpy()
        logits_NV = logits_NV - logits_NV.max(axis=1, keepdims=True)
        logprobs_NV = logits_NV - np.log(np.exp(logits_NV).sum(axis=1, keepdims=True))
        next_N = logprobs_NV[np.arange(N), batch["next_token_ids_N"].numpy()]
        sums_S = span_sums(next_N, np.array(LENGTHS))
        return float(alm(sums_S, batch["span_logprobs_S"].double().numpy(), tau).sum())

    moved = hidden_ND.clone().requires_grad_()
    loss: Any = fused(moved, weight_VD, batch, tau, 1.0, 3)
    loss.backward()
    assert moved.grad is not None
    assert float(loss.detach()) == pytest.approx(reference(hidden_ND), rel=1e-9)
    step = 1e-5
    for place in ((0, 0), (2, 3), (3, 1), (7, 4), (11, 2)):
        above, below = hidden_ND.clone(), hidden_ND.clone()
        above[place] += step
        below[place] -= step
        slope = (reference(above) - reference(below)) / (2 * step)
        assert float(moved.grad[place]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_a_warm_divergence_is_its_limit() -> None:
    """``(log p - log q) - log p (log log p - log log q)``, and cross-entropy's slope, scaled."""
    student_S = torch.tensor([-3.0, -0.2, -9.0, -1.0], dtype=torch.float64)
    teacher_S = torch.tensor([-2.0, -0.7, -0.1, -1.0], dtype=torch.float64)
    values_S, slopes_S = span_divergences(student_S, teacher_S, 1e6)
    expected_S = teacher_S - student_S + teacher_S * (student_S / teacher_S).log()
    torch.testing.assert_close(values_S, expected_S, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slopes_S, -(1 - teacher_S / student_S), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tau", TEMPERATURES)
def test_it_is_zero_where_both_agree_and_positive_elsewhere(tau: float) -> None:
    sums_S = torch.tensor([-30.0, -4.0, -0.5, -1e-4], dtype=torch.float64)
    values_S, slopes_S = span_divergences(sums_S, sums_S, tau)
    torch.testing.assert_close(values_S, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(slopes_S, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
    for factor in (0.5, 2.0):
        values_S, slopes_S = span_divergences(sums_S * factor, sums_S, tau)
        assert bool((values_S > 0).all()) and bool(((slopes_S > 0) == (factor < 1)).all())


def test_certainty_has_finite_values() -> None:
    """Of a student as of a teacher: log-probs of 0 come of float32."""
    sums_S = torch.tensor([0.0, 0.0, -5.0, -700.0])
    teacher_S = torch.tensor([0.0, -5.0, 0.0, -1000.0])
    for tau in TEMPERATURES:
        for each in span_divergences(sums_S, teacher_S, tau):
            assert bool(each.isfinite().all())


def test_at_temperature_one_single_tokens_are_two_outcomes() -> None:
    """Equal tokenizers: the KL between the next token and any other, of each position."""
    student_N, teacher_N = np.log([0.2, 0.9, 0.5]), np.log([0.4, 0.6, 0.5])
    values_N, _ = span_divergences(torch.from_numpy(student_N), torch.from_numpy(teacher_N), 1.0)
    expected = [
        0.4 * math.log(0.4 / 0.2) + 0.6 * math.log(0.6 / 0.8),
        0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1),
        0.0,
    ]
    np.testing.assert_allclose(values_N.numpy(), expected, atol=1e-12)


def test_a_certain_teacher_is_cross_entropy() -> None:
    """log p = 0 for each span: ``tau D = -log q``, in value and gradient."""
    batch = make_batch() | {"span_logprobs_S": torch.zeros(len(LENGTHS))}
    found = []
    for name in ("alm", "ce"):
        hidden_ND = normal(N, D, seed=1).requires_grad_()
        weight_VD = normal(V, D, seed=2)
        if name == "alm":
            loss = fused(hidden_ND, weight_VD, batch, 100.0, 1.0, 2)
        else:
            objective = CrossEntropy(batch["next_token_ids_N"])
            loss = chunked_loss(
                hidden_ND, StudentHead(weight_VD), objective, dtype=torch.float64
            ).loss
        loss.backward()  # type: ignore[no-untyped-call]
        found.append((loss.detach(), hidden_ND.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_a_batch_is_its_rows(data: CachedData) -> None:
    """Positions, spans and the teacher's sums of several rows, one after another."""
    dataset = open_dataset([spans_table(data)], split="train")
    rows = [dataset[index] for index in range(5)]
    for packing in (False, True):
        batch = SpansCollator(Collator("", 307, packing=packing))(rows)
        flat = batch["input_ids"].flatten()
        first = 0
        for row in rows:
            for (start, end), logprob in zip(row["scored_S2"], row["span_logprobs_S"], strict=True):
                at_N = (batch["span_of_N"] == first).nonzero()[:, 0]
                assert batch["next_token_ids_N"][at_N].tolist() == list(
                    row["input_ids_T"][start:end]
                )
                assert flat[batch["positions_N"][at_N]].tolist() == list(
                    row["input_ids_T"][start - 1 : end - 1]
                )
                assert float(batch["span_logprobs_S"][first]) == logprob
                first += 1
        assert first == len(batch["span_logprobs_S"]) == len(batch["span_bytes_S"])


def test_bits_per_byte_are_of_the_spans(data: CachedData) -> None:
    """Against a forward of each row by itself, in transformers."""
    folder = spans_table(data)
    model: Any = AutoModelForCausalLM.from_pretrained(data.student, dtype=torch.float64)
    nats = teacher = num_bytes = 0.0
    dataset = open_dataset([folder], split="heldout")
    for index in range(len(dataset)):
        row = dataset[index]
        ids_T = torch.from_numpy(row["input_ids_T"].astype(np.int64))
        with torch.no_grad():
            logprobs_TV = model(input_ids=ids_T[None]).logits[0].log_softmax(-1)
        for start, end in row["scored_S2"]:
            for t in range(start, end):
                nats -= float(logprobs_TV[t - 1, ids_T[t]])
        teacher -= float(row["span_logprobs_S"].sum(dtype=np.float64))
        num_bytes += int(row["span_bytes_S"].sum())
    found = evaluate(data.student, [folder])
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert found["teacher_bits_per_byte"] == pytest.approx(
        teacher / math.log(2) / num_bytes, rel=1e-5
    )
    assert "kl_to_teacher" not in found


@pytest.mark.slow
def test_a_student_comes_nearer_to_the_teacher(data: CachedData, tmp_path: Path) -> None:
    """Its log-probs of the training spans, by the divergence that is trained."""
    folder = spans_table(data)
    body = {"loss": "alm", "temperature": 100.0}
    settings: dict[str, Any] = {"lr": 3e-3, "per_device_batch_size": 6, "scheduler": "linear"}
    config = TrainConfig(objective=AlmConfig.model_validate(body), max_steps=40, **settings)
    result = train(config, student=data.student, data=[folder], output=tmp_path / "alm")
    losses = [entry["alm"] for entry in result.history if "alm" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_a_student_of_another_tokenizer_is_refused(data: CachedData, tmp_path: Path) -> None:
    save_model(tmp_path / "student", seed=3, num_layers=1)
    for path in (tmp_path / "student").glob("tokenizer*"):
        path.unlink()
    kind = save_kind(tmp_path / "kind", "byte_level", "PreTrainedTokenizerFast")
    for path in kind.glob("tokenizer*"):
        (tmp_path / "student" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(IdentityMismatch, match="has tokenizer"):
        train(
            TrainConfig(objective=AlmConfig(), max_steps=1),
            student=tmp_path / "student",
            data=[spans_table(data)],
            output=tmp_path / "out",
        )


def test_other_objectives_name_what_they_need() -> None:
    tables = [("aligned_spans", "")]
    AlmConfig().require(tables, [])
    with pytest.raises(ConfigError, match="objective 'kd' needs a documents, episodes or"):
        KdConfig().require(tables, [])
