"""Training at selected positions: which they are, loss and gradient there, nothing elsewhere.

Dimensions: P = scored positions of a row, N = of a batch, V = vocabulary, T = tokens of a row.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pipeline.executors.local.training import train_in_processes
from pipeline.executors.training_job import TrainingJob
from schemas.dataset import CachedDataset, open_dataset
from schemas.distribution import weighted_tokens
from schemas.errors import ConfigError, RejectLimitError, StoreError
from schemas.scored_spans import scored_targets
from schemas.table import Table
from schemas.tables.documents import DOCUMENTS
from schemas.tables.span_masks import SPAN_MASKS, SpanMask
from schemas.tables.teacher_logits import ENCODINGS as LOGITS
from schemas.tables.token_entropies import TOKEN_ENTROPIES, TokenEntropies
from stages.models.causal_lm.model import load_student
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.stage import TableRef
from stages.student.batches.signals import IGNORED
from stages.student.batches.training_data import TrainingData, teacher_head_of
from stages.student.hf_trainer import distillation
from stages.student.losses.step import Step
from stages.student.objectives.kd import KdConfig
from stages.student.options import TrainOptions
from stages.student.selected_positions import largest
from stages.student.train.stage import TrainConfig, TrainStage
from stages.student.train.work import TrainResult, train
from tests.fixtures.cached_data import (
    VOCAB_SIZE,
    make_cached_data,
    make_conversations,
    make_documents,
    write_table,
)
from tests.fixtures.changed_entries import write_changed
from tests.fixtures.position_gradients import CPU, sequence_of, train_one_step

OPTIONS = TrainOptions(num_workers=0, log_every=1)
BY_TEACHER = {"by": "teacher_entropy", "fraction": 0.3}
BY_STUDENT = {"by": "student_entropy", "fraction": 0.3}
BY_MASK = {"by": "mask"}
EVERY = pytest.mark.parametrize(
    "positions", [BY_TEACHER, BY_STUDENT, BY_MASK], ids=["teacher", "student", "mask"]
)
ROWS = [3, 0, 5, 8]  # one of them has two tokens
F64Array = npt.NDArray[np.float64]


@torch.no_grad()
def logprobs_of(folder: Path, ids_T: Any, targets_P: Any) -> F64Array:
    """[P, V] by a plain float64 pass."""
    model: Any = LlamaForCausalLM.from_pretrained(folder).double().eval()
    logits_TV = model(torch.from_numpy(np.asarray(ids_T, np.int64))[None]).logits[0]
    return np.asarray(logits_TV[targets_P - 1].log_softmax(-1))


def entropy_of(logprobs_PV: F64Array) -> F64Array:
    return np.asarray(-(np.exp(logprobs_PV) * logprobs_PV).sum(axis=1))


def marked(num_tokens: int) -> npt.NDArray[np.int32]:
    """Two spans of a row, of a short one its last token; the second begins with a chat's first."""
    spans = [[3, 4], [7, num_tokens - 2]] if num_tokens > 9 else [[num_tokens - 1, num_tokens]]
    return np.array(spans, np.int32)


class Caches:
    """A teacher's tables of documents and chats, the student's entropies of them, and masks."""

    def __init__(self, root: Path) -> None:
        self.data = make_cached_data(root)
        for name, rows in (("documents", make_documents()), ("chats", make_conversations())):
            found, masks, splits = [], [], {}
            for row in rows:
                columns = {"input_ids_T": row.input_ids_T}
                if hasattr(row, "scored_S2"):
                    columns |= {"scored_S2": row.scored_S2}
                logprobs_PV = logprobs_of(
                    self.data.student, row.input_ids_T, scored_targets(columns)
                )
                entropies_P = entropy_of(logprobs_PV)
                found.append(TokenEntropies(sample_id=row.sample_id, token_entropies_P=entropies_P))
                selected_S2 = marked(len(row.input_ids_T))
                masks.append(SpanMask(sample_id=row.sample_id, selected_S2=selected_S2))
                splits[row.sample_id] = row.split
            bound: Any = SPAN_MASKS.bind(vocab_size=VOCAB_SIZE)
            write_table(self.masks(name), bound, masks, self.data.student, splits=splits)
            bound = TOKEN_ENTROPIES.bind(vocab_size=VOCAB_SIZE)
            write_table(self.entropies(name), bound, found[::-1], self.data.student, splits=splits)

    def entropies(self, name: str) -> Path:
        return self.data.root / f"entropies of {name}"

    def masks(self, name: str) -> Path:
        return self.data.root / f"masks of {name}"

    def tables(self, name: str, encoding: str) -> list[Path]:
        own = self.data.tables if name == "documents" else self.data.chats
        return [*own(encoding), self.masks(name), self.entropies(name)]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Caches:
    return Caches(tmp_path_factory.mktemp("caches"))


def chosen(row: Mapping[str, Any], positions: Mapping[str, Any]) -> list[int]:
    """The positions of a row: of its spans, or by sorted pairs, entropy down, then place up."""
    if positions["by"] == "mask":
        targets = scored_targets(row).tolist()
        spans = row["selected_S2"].tolist()
        return [j for j, t in enumerate(targets) if any(a <= t < b for a, b in spans)]
    column = "entropies_P" if positions["by"] == "teacher_entropy" else "token_entropies_P"
    by_entropy = sorted((-float(e), j) for j, e in enumerate(row[column]))
    count = next(n for n in range(1, len(by_entropy) + 1) if n >= 0.3 * len(by_entropy))
    return sorted(j for _, j in by_entropy[:count])


def test_the_largest_are_taken_and_of_equal_ones_the_earlier() -> None:
    values_P = np.array([1.0, 3.0, 2.0, 3.0, 0.0, 2.0])
    at = [np.flatnonzero(largest(values_P, share)).tolist() for share in (0.01, 0.2, 0.5, 0.51, 1)]
    assert at == [[1], [1, 3], [1, 2, 3], [1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]
    assert np.flatnonzero(largest(np.zeros(5), 0.4)).tolist() == [0, 1]


@pytest.mark.parametrize("fraction", [0.01, 0.07, 0.1, 0.2, 0.29, 0.3, 0.55, 0.57, 0.7, 1.0])
def test_the_count_is_the_ceiling_of_the_decimal_fraction(fraction: float) -> None:
    """0.07 * 100 is a little more than 7 in floats."""
    percent = round(100 * fraction)
    for num_positions in (1, 3, 30, 99, 100, 511, 8191):
        expected = -(-percent * num_positions // 100)
        assert largest(np.arange(num_positions), fraction).sum() == expected


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("encoding", LOGITS)
@pytest.mark.parametrize("name", ["documents", "chats"])
def test_a_batch_is_the_whole_one_at_these_positions(
    caches: Caches, name: str, encoding: str, packing: bool
) -> None:
    dataset = open_dataset(caches.tables(name, encoding), split="train")
    data = TrainingData(dataset, None, VOCAB_SIZE, 0, packing=packing)
    rows, collate = KdConfig().batches(data)
    picked = [rows[index] for index in ROWS]
    whole = collate(picked)
    for positions in (BY_TEACHER, BY_STUDENT, BY_MASK):
        batch = KdConfig.model_validate({"positions": positions}).batches(data).collate(picked)
        starts = np.cumsum([0, *(len(row["entropies_P"]) for row in picked)])
        at = [
            start + j
            for start, row in zip(starts, picked, strict=False)
            for j in chosen(row, positions)
        ]
        assert batch.keys() == whole.keys()
        for column, values in batch.items():
            if column.endswith(("_N", "_NK", "_ND")):
                torch.testing.assert_close(values, whole[column][at])
        places = (batch["labels"].view(-1) != IGNORED).nonzero()[:, 0]
        assert places.tolist() == (batch["positions_N"] + 1).tolist()
        torch.testing.assert_close(batch["input_ids"], whole["input_ids"])


def step_of(dataset: CachedDataset, model: Any) -> Step:
    head = teacher_head_of(dataset, CPU)
    dtype = next(model.parameters()).dtype
    return Step(model, model, dtype, head, None, 1000, 0.0)


def loss_of(config: KdConfig, dataset: CachedDataset, model: Any) -> Tensor:
    """The sum over the positions of ``ROWS``, by the way of a run."""
    rows, collate = config.batches(TrainingData(dataset, None, VOCAB_SIZE, 0))
    (term,) = config.terms(collate([rows[index] for index in ROWS]), step_of(dataset, model))
    return term.total


def dense_teacher(row: Mapping[str, Any]) -> Tensor:
    """[P, V] what is stored of a ``threshold`` row."""
    ids_PK, weights_PK = weighted_tokens(row)
    ids, weights = torch.from_numpy(ids_PK.astype("i8")), torch.from_numpy(weights_PK).double()
    dense: Tensor = torch.zeros(len(ids), VOCAB_SIZE, dtype=torch.float64)
    return dense.scatter_add(1, ids, weights)


def reference(
    dataset: CachedDataset, model: Any, positions: Mapping[str, Any], weight: float
) -> Tensor:
    """The same by the definition, a row at a time, dense and in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for row in map(dataset.__getitem__, ROWS):
        targets_P = torch.from_numpy(scored_targets(row))
        ids_T = torch.from_numpy(row["input_ids_T"].astype("i8"))
        logprobs_PV = model(ids_T[None]).logits[0, targets_P - 1].log_softmax(-1)
        teacher_PV = dense_teacher(row)
        for j in chosen(row, positions):
            entropy = float(row["entropies_P"][j])
            kl = -(teacher_PV[j] * logprobs_PV[j]).sum() - entropy
            cross = -logprobs_PV[j, ids_T[targets_P[j]]]
            total = total + weight * kl + (1 - weight) * cross
    return total


@pytest.mark.parametrize("weight", [1.0, 0.6])
@EVERY
@pytest.mark.parametrize("name", ["documents", "chats"])
def test_loss_and_gradient_are_those_of_the_definition(
    caches: Caches, name: str, positions: dict[str, Any], weight: float
) -> None:
    dataset = open_dataset(caches.tables(name, "threshold"), split="train")
    config = KdConfig.model_validate({"positions": positions, "weight": weight})
    student = caches.data.student
    models: list[Any] = [LlamaForCausalLM.from_pretrained(student).double() for _ in range(2)]
    found = loss_of(config, dataset, models[0])
    expected = reference(dataset, models[1], positions, weight)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.autograd.backward([found, expected])
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def wide_norm(norm: Any, hidden: Tensor) -> Tensor:
    scale = (hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    scaled: Tensor = norm.weight * (hidden * scale)
    return scaled


@EVERY
def test_the_gradient_is_a_finite_difference(
    caches: Caches, positions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along a random direction in all weights at once, all of it in float64."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", wide_norm)  # its own is float32 in any model
    dataset = open_dataset(caches.tables("documents", "exact"), split="train")
    config = KdConfig.model_validate({"positions": positions, "weight": 0.6})
    model: Any = LlamaForCausalLM.from_pretrained(caches.data.student).double()
    torch.autograd.backward(loss_of(config, dataset, model))
    torch.manual_seed(0)
    ways = [torch.randn_like(weight) for weight in model.parameters()]
    slope = sum(
        float((weight.grad * way).sum())
        for weight, way in zip(model.parameters(), ways, strict=True)
    )
    ends = []
    step = 1e-6
    for sign in (step, -2 * step):
        with torch.no_grad():
            for weight, way in zip(model.parameters(), ways, strict=True):
                weight += sign * way
        ends.append(float(loss_of(config, dataset, model).detach()))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
@EVERY
def test_no_other_position_has_a_gradient(
    caches: Caches, positions: dict[str, Any], packing: bool
) -> None:
    """At those that are selected it is the one of all positions, but for what divides the step."""
    student = load_student(caches.data.student, device=CPU)
    dataset = open_dataset(caches.tables("documents", "threshold"), split="train")
    step = partial(train_one_step, dataset=dataset, lm_dataset=None, student=student, reader=None)
    config = KdConfig.model_validate({"positions": positions, "weight": 0.6})
    at_some = step(config, indices=ROWS, packing=packing)
    at_all = step(KdConfig(weight=0.6), indices=ROWS, packing=packing)
    places = {
        (sequence_of(row["input_ids_T"]), j) for row in at_some.rows for j in chosen(row, positions)
    }
    assert set(at_some.gradients) == places < set(at_all.gradients)
    share = at_all.counts["tokens"] / at_some.counts["tokens"]
    for place, found_D in at_some.gradients.items():
        expected_D = share * at_all.gradients[place]
        torch.testing.assert_close(found_D, expected_D, rtol=1e-4, atol=1e-7)


def test_a_changed_entropy_moves_the_selection_of_its_row_alone(
    caches: Caches, tmp_path: Path
) -> None:
    student = load_student(caches.data.student, device=CPU)
    tables = caches.tables("documents", "threshold")
    config = KdConfig.model_validate({"positions": BY_STUDENT})
    runs = []
    row = open_dataset(tables, split="train")[ROWS[0]]
    at = chosen(row, BY_STUDENT)
    left_out = next(j for j in range(len(row["entropies_P"])) if j not in at)

    def raised(stored: TokenEntropies) -> TokenEntropies:
        values_P = stored.token_entropies_P.copy()
        values_P[left_out] = 5.5
        return replace(stored, token_entropies_P=values_P)

    write_changed(tables[-1], tmp_path / "changed", row["sample_id"], raised)
    for folders in (tables, [*tables[:-1], tmp_path / "changed"]):
        dataset = open_dataset(folders, split="train")
        runs.append(train_one_step(config, dataset, None, student, None, indices=ROWS))
    before, after = (set(run.gradients) for run in runs)
    sequence = sequence_of(row["input_ids_T"])
    assert after - before == {(sequence, left_out)}
    ((other, dropped),) = before - after
    assert other == sequence and dropped in at


@pytest.mark.parametrize("by", ["teacher", "student"])
def test_cached_is_live(caches: Caches, by: str) -> None:
    """Both models run whole at the step, in float64: they select, and the teacher teaches.

    Stored entropies are rounded, so of two that are nearly equal the other one may be taken.
    """
    data = caches.data
    dataset = open_dataset(caches.tables("documents", "exact"), split="train")
    positions = {"by": f"{by}_entropy", "fraction": 0.3}
    model: Any = LlamaForCausalLM.from_pretrained(data.student).double()
    found = loss_of(KdConfig.model_validate({"positions": positions}), dataset, model)
    total, num_near = 0.0, 0
    for row in map(dataset.__getitem__, ROWS):
        targets_P = scored_targets(row)
        teacher_PV, student_PV = (
            logprobs_of(folder, row["input_ids_T"], targets_P)
            for folder in (data.teacher, data.student)
        )
        live_P = entropy_of(teacher_PV if by == "teacher" else student_PV)
        count = math.ceil(0.3 * len(live_P))
        live = set(np.argsort(-live_P, kind="stable")[:count].tolist())
        cut = np.sort(live_P)[-count]
        for j in live ^ set(chosen(row, positions)):
            assert abs(live_P[j] - cut) < 0.005
            num_near += 1
        kl_P = (np.exp(teacher_PV) * (teacher_PV - student_PV)).sum(axis=1)
        total += float(kl_P[sorted(live)].sum())
    assert num_near == 0
    assert float(found.detach()) == pytest.approx(total, rel=2e-3)


def trained(
    caches: Caches, output: Path, positions: Mapping[str, Any] | None, **settings: Any
) -> TrainResult:
    body = {"per_device_batch_size": 4, **settings, "max_steps": 3, "lr": 1e-2}
    config = TrainConfig.model_validate(
        {"objective": {"loss": "kd", "positions": positions}, **body}
    )
    tables = caches.tables("documents", "threshold")
    return train(config, student=caches.data.student, data=tables, output=output, options=OPTIONS)


@pytest.mark.slow
@EVERY
def test_a_run_counts_what_it_trains_at_and_measures_all(
    caches: Caches, tmp_path: Path, positions: dict[str, Any]
) -> None:
    """However rows fall into batches and rows of one packed, a step is the same mean."""
    found = trained(caches, tmp_path / "one", positions)
    plain = trained(caches, tmp_path / "plain", None)
    rows = open_dataset(caches.tables("documents", "threshold"), split="train")
    expected = {index: len(chosen(rows[index], positions)) for index in range(len(rows))}
    assert found.metrics["train"]["samples"] == plain.metrics["train"]["samples"] == 12
    most = sum(sorted(expected.values())[-12:])
    assert 0 < found.metrics["train"]["tokens"] <= most < plain.metrics["train"]["tokens"]
    for split in ("before", "after"):
        assert found.metrics[split]["tokens"] == plain.metrics[split]["tokens"]
    assert found.metrics["before"] == plain.metrics["before"]
    losses = [entry["loss"] for entry in found.history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] != losses[0]
    shapes: dict[str, dict[str, Any]] = {
        "accumulated": {"per_device_batch_size": 1, "gradient_accumulation_steps": 4},
        "packed": {"packing": True},
    }
    for name, settings in shapes.items():
        other = trained(caches, tmp_path / name, positions, **settings)
        same = [entry["loss"] for entry in other.history if "loss" in entry]
        np.testing.assert_allclose(same, losses, rtol=1e-4)


@pytest.mark.slow
def test_held_out_rows_need_no_mask(caches: Caches, tmp_path: Path) -> None:
    """Spans of rows to train on are all that has to be given; what is measured stays the same."""
    rows = [row for row in make_documents() if row.split == "train"]
    masks = [
        SpanMask(sample_id=row.sample_id, selected_S2=marked(len(row.input_ids_T))) for row in rows
    ]
    splits = {row.sample_id: "train" for row in rows}
    bound = SPAN_MASKS.bind(vocab_size=VOCAB_SIZE)
    write_table(tmp_path / "masks", bound, masks, caches.data.student, splits=splits)
    plain = trained(caches, tmp_path / "plain", None)
    config = {"objective": {"loss": "kd", "positions": BY_MASK}, "max_steps": 1}
    found = train(
        TrainConfig.model_validate(config),
        student=caches.data.student,
        data=[*caches.data.tables("threshold"), tmp_path / "masks"],
        output=tmp_path / "out",
        options=OPTIONS,
    )
    assert found.metrics["before"] == plain.metrics["before"]


@pytest.mark.slow
def test_two_processes_take_the_same_steps(
    caches: Caches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows differ in length, so one has more selected positions than the other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    objective = {"loss": "kd", "positions": BY_STUDENT}
    body = {"objective": objective, "per_device_batch_size": 6, "max_steps": 4, "lr": 1e-2}
    losses = []
    for processes in (1, 2):
        job = TrainingJob(
            config=TrainConfig.model_validate(body),
            student=caches.data.student,
            data=tuple(caches.tables("documents", "threshold")),
            output=tmp_path / str(processes),
            fingerprint="the same",
            options=OPTIONS,
        )
        if processes == 1:
            job.carry_out(lambda event: None)
        else:
            train_in_processes(job, processes, lambda event: None)
        record = read_checkpoint(job.output)
        assert record is not None
        losses.append([entry["loss"] for entry in record.history if "loss" in entry])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ({"by": "teacher_entropy", "fraction": 0.0}, "positions.teacher_entropy.fraction"),
        ({"by": "student_entropy", "fraction": 1.1}, "positions.student_entropy.fraction"),
        ({"by": "entropy"}, "positions"),
        ({"by": "mask", "fraction": 0.2}, "positions.mask.fraction"),
        ({"fraction": 0.2}, "positions"),
    ],
)
def test_settings_without_sense_are_refused(positions: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        KdConfig.model_validate({"positions": positions})
    (problem,) = error.value.errors()
    assert ".".join(map(str, problem["loc"])) == said


def test_tables_that_do_not_fit_are_refused_in_one_line() -> None:
    rows, teacher, own = ("documents", ""), ("teacher_logits", "top_k"), ("token_entropies", "")
    by_student = KdConfig.model_validate({"positions": BY_STUDENT})
    by_teacher = KdConfig.model_validate({"positions": BY_TEACHER})
    by_mask = KdConfig.model_validate({"positions": BY_MASK})
    by_student.require([rows, teacher, own], [])
    by_mask.require([rows, teacher, ("span_masks", "")], [])
    by_teacher.require([rows, teacher], [])
    for config, tables, said in (
        (by_student, [rows, teacher], "needs a token_entropies table"),
        (by_mask, [rows, teacher], "needs a span_masks table"),
        (by_student, [rows, teacher, own, own], "2 of its tables are token_entropies"),
        (by_teacher, [rows, teacher, teacher], "one data set with one teacher"),
        (by_teacher, [rows, teacher, rows, teacher], "2 tables of rows and 2 teacher_logits"),
    ):
        with pytest.raises(ConfigError) as error:
            config.require(tables, [])
        assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValidationError, match="leave out mixture or positions"):
        mixture = {"kind": "arithmetic", "weights": [1, 1]}
        KdConfig.model_validate({"positions": BY_TEACHER, "mixture": mixture})
    with pytest.raises(ConfigError, match="distillation: positions: "):
        distillation(["nowhere"], "nowhere", positions=BY_TEACHER)


def table_ref(step: str, table: Table[Any], model: str) -> TableRef:
    return TableRef(step, table, {"weights": model, "dtype": "float32"} if model else None)


def test_entropies_of_another_model_are_refused() -> None:
    stage = TrainStage.model_validate(
        {
            "stage": "train",
            "student": "student",
            "data": ["text", "told", "unsure"],
            "objective": {"loss": "kd", "positions": BY_STUDENT},
            "max_steps": 1,
        }
    )
    teacher = TableRef("told", LOGITS["threshold"], {"weights": "teacher"})
    models = {"student": {"weights": "student", "dtype": "bfloat16"}}
    text = table_ref("text", DOCUMENTS, "")
    stage.check([text, teacher, table_ref("unsure", TOKEN_ENTROPIES, "student")], models)
    with pytest.raises(ConfigError, match="'unsure' has the entropies of another model") as error:
        stage.check([text, teacher, table_ref("unsure", TOKEN_ENTROPIES, "teacher")], models)
    assert "\n" not in str(error.value)


def collated(positions: Mapping[str, Any], dataset: CachedDataset, **changed: Any) -> None:
    config = KdConfig.model_validate({"positions": positions})
    _, collate = config.batches(TrainingData(dataset, None, VOCAB_SIZE, 0))
    collate([dataset[0] | changed])


def test_rows_that_cannot_be_selected_from_are_refused(caches: Caches, tmp_path: Path) -> None:
    dataset = open_dataset(caches.tables("documents", "top_k"), split="train")
    unknown_P = np.full(len(dataset[0]["entropies_P"]), np.nan, np.float16)
    with pytest.raises(ConfigError, match="entropies of this teacher are not known"):
        collated(BY_TEACHER, dataset, entropies_P=unknown_P)
    collated(BY_STUDENT, dataset, entropies_P=unknown_P)
    with pytest.raises(StoreError, match="token_entropies has 3 positions, its teacher_logits"):
        collated(BY_STUDENT, dataset, token_entropies_P=np.zeros(3))


def test_rows_without_entropies_are_counted_as_missing(caches: Caches, tmp_path: Path) -> None:
    """Too many of them are another input's table, which is said before a step is taken."""
    rows = [
        TokenEntropies(sample_id=row.sample_id, token_entropies_P=np.ones(len(row.input_ids_T) - 1))
        for row in make_documents()
        if row.split == "train"
    ][:4]
    splits = {row.sample_id: "train" for row in rows}
    bound = TOKEN_ENTROPIES.bind(vocab_size=VOCAB_SIZE)
    write_table(tmp_path / "few", bound, rows, caches.data.student, splits=splits)
    body = {"objective": {"loss": "kd", "positions": BY_STUDENT}, "max_steps": 1}
    with pytest.raises(RejectLimitError, match="max_missing_fraction"):
        train(
            TrainConfig.model_validate(body),
            student=caches.data.student,
            data=[*caches.data.tables("threshold"), tmp_path / "few"],
            output=tmp_path / "out",
            options=OPTIONS,
        )
