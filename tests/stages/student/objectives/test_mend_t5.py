"""MEND with a T5 as reader: one batch against plain float64, and runs from the cache.

Dimensions: P = scored positions, V = vocabulary.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from schemas.dataset import open_dataset
from schemas.errors import ConfigError, StoreError
from schemas.storage.files import sha256_of
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.encoder_decoder.halves import Frame
from stages.student.batches.demonstrations import DemonstrationsCollator
from stages.student.batches.signals import Collator
from stages.student.batches.step_rows import counts_of
from stages.student.distiller.distiller import load_distiller
from stages.student.distiller.reader import load_reader
from stages.student.losses.step import UNITS, Step
from stages.student.objectives.mend import MendConfig
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import TrainResult, train
from tests.fixtures.cached_data import VOCAB_SIZE
from tests.fixtures.demonstration_data import MendData, make_mend_data
from tests.fixtures.t5_mend import SlowT5Mend, halves, make_t5_models, num_scored
from tests.fixtures.tiny_t5 import END, PAD

pytestmark = pytest.mark.slow

F64, CPU = torch.float64, torch.device("cpu")
FRAME = Frame(PAD, END)
STAGE_1, STAGE_2 = MendConfig(answer_weight=0.0), MendConfig(answer_weight=0.7, kl_weight=1.3)


@pytest.fixture(
    scope="module", params=[("older", "t5"), ("newer", "causal")], ids=["older", "newer"]
)
def data(request: Any, tmp_path_factory: pytest.TempPathFactory) -> MendData:
    """Each generation, and each kind of distiller."""
    root = tmp_path_factory.mktemp("mend")
    return make_mend_data(root, models=make_t5_models(root, *request.param))


def rows_of(data: MendData, source: str) -> list[dict[str, Any]]:
    dataset = open_dataset(data.tables(source, "exact"), split="train")
    return [dataset[index] for index in (0, 1, 4)]


@pytest.mark.parametrize(
    ("source", "config"), [("documents", STAGE_1), ("episodes", STAGE_2)], ids=["1", "2"]
)
def test_one_batch_matches_the_live_teacher_in_float64(
    data: MendData, source: str, config: MendConfig
) -> None:
    """Loss and gradients; states and entropies of the cache have 11 significant bits."""
    rows = rows_of(data, source)
    signals = Collator("exact", VOCAB_SIZE)
    needs_answers = config.answer_weight > 0
    batch = DemonstrationsCollator(signals, needs_answers=needs_answers, frame=FRAME)(rows)
    distiller = load_distiller(data.models.distiller, device=CPU).double()
    reader = load_reader(data.models.teacher, device=CPU, dtype=F64)
    step = Step(
        model=distiller,
        bare=distiller,
        dtype=F64,
        teacher_head=LanguageHead.load(data.root / f"{source}_exact", device="cpu"),
        lm_teacher_head=None,
        micro_batch_tokens=60,
        progress=0.0,
        reader=reader,
    )
    counts = dict(zip(UNITS, counts_of(batch), strict=True))
    terms = config.terms(batch, step)
    found: Any = torch.stack([t.weight * t.total / counts[t.unit] for t in terms]).sum()
    found.backward()
    assert all(parameter.grad is None for parameter in reader.parameters())

    slow, made = SlowT5Mend(data.models), data.rows(source)
    kl, hard = [], []
    for row in (made[one["sample_id"]] for one in rows):
        own_PV, teacher_PV = slow.logprobs(row), slow.teacher(row)
        kl.append((teacher_PV.exp() * (teacher_PV - own_PV)).sum(-1))
        ids_P = torch.tensor(halves(row)[1][-num_scored(row) :])
        hard.append(-own_PV.gather(1, ids_P[:, None])[:, 0])
    loss: Any = config.kl_weight * torch.cat(kl).mean()
    assert counts["tokens"] == len(torch.cat(kl)) and counts["samples"] == 3
    if needs_answers:
        loss = loss + config.answer_weight * torch.cat(hard).mean()
        assert counts["answer_tokens"] == counts["tokens"]
        sums = {name: value for term in terms for name, value in term.sums.items()}
        total = torch.cat(hard).sum().item()
        assert float(sums["answer_cross_entropy"]) == pytest.approx(total, rel=1e-9)
    loss.backward()
    assert found.item() == pytest.approx(loss.item(), rel=5e-4)
    grads = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    assert set(grads) == {name for name, w in slow.weights.items() if w.grad is not None}
    for name, grad in grads.items():
        expected: Any = slow.weights[name].grad
        assert float((grad - expected).abs().max() / expected.abs().max()) < 5e-3, name


def test_a_batch_pairs_by_the_tokens_of_each_row(data: MendData) -> None:
    """What is read and what is predicted, by index; a signal about others is refused."""
    for source in ("documents", "episodes"):
        rows, made = rows_of(data, source), data.rows(source)
        batch = DemonstrationsCollator(Collator("exact", VOCAB_SIZE), frame=FRAME)(rows)
        width, at = batch["input_ids"].shape[1], 0
        for b, row in enumerate(made[one["sample_id"]] for one in rows):
            text, said = halves(row)
            query = text[row.query_start :]
            length = int(batch["encoder_lengths_B"][b])
            assert batch["encoder_ids_BE"][b, :length].tolist() == [*query, END]
            assert batch["input_ids"][b, : len(said) + 1].tolist() == [PAD, *said]
            count = num_scored(row)
            targets = list(range(len(said) - count, len(said)))
            found = slice(at, at + count)
            assert batch["positions_N"][found].tolist() == [b * width + j for j in targets]
            assert batch["next_token_ids_N"][found].tolist() == [said[j] for j in targets]
            assert batch["in_answer_N"][found].all() == (source == "episodes")
            at += count
        assert at == len(batch["hidden_ND"])
    moved = rows[0] | {"first_target": rows[0]["first_target"] - 1}
    with pytest.raises(StoreError, match=r"the row's spans have \d+ from"):
        DemonstrationsCollator(Collator("exact", VOCAB_SIZE), frame=FRAME)([moved])
    strict = DemonstrationsCollator(Collator("", VOCAB_SIZE), needs_answers=True, frame=FRAME)
    with pytest.raises(ConfigError, match="has no answer"):
        strict(rows_of(data, "documents"))


OPTIONS = TrainOptions(num_workers=0, log_every=1, checkpoint_every=3)
CONFIG = TrainConfig(max_steps=40, lr=1e-2, per_device_batch_size=4)


def run(
    data: MendData,
    output: Path,
    objective: MendConfig,
    *,
    heldout: bool = False,
    on_event: Any = None,
    **settings: Any,
) -> TrainResult:
    source = "episodes" if objective.answer_weight else "documents"
    return train(
        CONFIG.model_copy(update=settings | {"objective": objective}),
        student=data.models.distiller,
        reader=data.models.teacher,
        data=data.tables(source, "exact"),
        output=output,
        heldout=heldout,
        on_event=on_event,
        options=OPTIONS,
    )


@pytest.mark.parametrize("objective", [STAGE_1, STAGE_2], ids=["1", "2"])
def test_the_distiller_learns_and_the_reader_does_not(
    data: MendData, tmp_path: Path, objective: MendConfig
) -> None:
    before = sha256_of(data.models.teacher / "model.safetensors")
    result = run(data, tmp_path / "out", objective, heldout=True)
    losses = [entry["loss"] for entry in result.history]
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
    assert sha256_of(data.models.teacher / "model.safetensors") == before
    source = "episodes" if objective.answer_weight else "documents"
    slow, kl, nll = SlowT5Mend(data.models), [], []
    for row in (row for row in data.rows(source).values() if row.split == "heldout"):
        with torch.no_grad():
            own_PV, teacher_PV = slow.logprobs(row), slow.teacher(row)
        kl.append((teacher_PV.exp() * (teacher_PV - own_PV)).sum(-1))
        ids_P = torch.tensor(halves(row)[1][-num_scored(row) :])
        nll.append(-own_PV.gather(1, ids_P[:, None])[:, 0])
    found = result.metrics["before"]
    assert found["tokens"] == len(torch.cat(nll))
    assert found["cross_entropy"] == pytest.approx(torch.cat(nll).mean().item(), rel=1e-5)
    assert found["kl_to_teacher"] == pytest.approx(torch.cat(kl).mean().item(), rel=2e-3)


def test_a_row_does_not_hear_of_its_neighbours(data: MendData, tmp_path: Path) -> None:
    """Padding in encoder, decoder and distiller: one batch of four, or four of one."""
    whole = run(data, tmp_path / "a", STAGE_2, max_steps=2)
    parts = run(
        data,
        tmp_path / "b",
        STAGE_2,
        max_steps=2,
        per_device_batch_size=1,
        gradient_accumulation_steps=4,
    )
    losses = [[entry["loss"] for entry in result.history] for result in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    assert np.isfinite(losses[0]).all()


class Stopped(Exception):
    """What a test throws from ``on_event`` to stop a run."""


def stop_at_four(event: dict[str, Any]) -> None:
    if event["event"] == "step" and event["step"] == 4:
        raise Stopped


def test_a_stopped_run_resumes_with_the_same_losses(data: MendData, tmp_path: Path) -> None:
    """A T5's encoder has its embeddings twice under one weight: checkpoints hold them once."""
    whole = run(data, tmp_path / "whole", STAGE_2, max_steps=6)
    with pytest.raises(Stopped):
        run(data, tmp_path / "out", STAGE_2, on_event=stop_at_four, max_steps=6)
    resumed = run(data, tmp_path / "out", STAGE_2, max_steps=6)
    losses = [[entry["loss"] for entry in result.history] for result in (whole, resumed)]
    assert losses[0] == losses[1]
    bytes_of = [(out / "model.safetensors").read_bytes() for out in (whole.output, resumed.output)]
    assert bytes_of[0] == bytes_of[1]


def test_what_has_no_room_is_one_line(data: MendData, tmp_path: Path) -> None:
    """No window in these folders; an older one that names 8 positions has room for 5 of a query."""
    models = data.models
    folder = tmp_path / "reader"
    shutil.copytree(models.teacher, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_positions": 8}))
    with pytest.raises(ConfigError, match=r"a query of \d+ tokens, with 3 vectors more than .* 8"):
        train(
            CONFIG.model_copy(update={"objective": STAGE_2}),
            student=models.distiller,
            reader=folder,
            data=data.tables("episodes", "exact"),
            output=tmp_path / "out",
            heldout=False,
            options=OPTIONS,
        )
