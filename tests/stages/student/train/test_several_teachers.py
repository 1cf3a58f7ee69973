"""Several data sets and several teachers in one run: joined, taught, measured, refused, live."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from pipeline.executors.local.training import train_in_processes
from pipeline.executors.training_job import TrainingJob
from schemas.dataset import open_dataset
from schemas.errors import ConfigError, IdentityMismatch, RejectLimitError
from schemas.sample_id import sample_id_of
from schemas.storage.manifest import read_manifest, write_manifest
from schemas.tables import TABLES
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.teacher_logits import ENCODINGS
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.student.batches.several_datasets import SeveralDatasets, open_data_sets
from stages.student.batches.training_data import TrainingData, teacher_head_of, teacher_heads_of
from stages.student.evaluate.positions import HeldOut, measure_student
from stages.student.hf_trainer import distillation
from stages.student.losses.step import Step
from stages.student.objectives.kd import KdConfig
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig, TrainStage
from stages.student.train.work import train
from tests.fixtures.cached_data import (
    VOCAB_SIZE,
    CachedData,
    make_cached_data,
    make_documents,
    save_model,
    write_signals,
    write_table,
)
from tests.fixtures.changed_entries import CHANGES, places_of, write_changed
from tests.fixtures.position_gradients import changed_places, sequence_of, train_one_step

CPU = torch.device("cpu")
OPTIONS = TrainOptions(num_workers=0, log_every=1)
MIXTURE = {"kind": "arithmetic", "weights": [3, 1]}


class Caches:
    """``first``'s documents told by two teachers, and ``second``'s own documents by the other."""

    def __init__(self, root: Path) -> None:
        self.first = make_cached_data(root)
        self.student = self.first.student
        self.teachers = [self.first.teacher, root / "second" / "teacher"]
        save_model(self.teachers[1], seed=7, num_layers=1)
        self.second = CachedData(root / "second", self.teachers[1], self.student)
        documents = make_documents()
        rng = np.random.default_rng(5)
        self.other_documents = []
        for index, length in enumerate((7, 12, 5, 9, 2, 11, 8, 6)):
            ids_T = rng.integers(0, VOCAB_SIZE, length)
            split = "heldout" if index % 4 == 3 else "train"
            self.other_documents.append(
                Document(sample_id=sample_id_of(ids_T), split=split, input_ids_T=ids_T)
            )
        bound = DOCUMENTS.bind(vocab_size=VOCAB_SIZE)
        write_table(self.second.documents, bound, self.other_documents, self.teachers[1])
        for encoding in ENCODINGS:
            write_signals(self.second, encoding, self.other_documents)
            write_signals(self.second, encoding, documents, self.about_first(encoding))

    def about_first(self, encoding: str) -> Path:
        """The second teacher's signals about the first documents."""
        return self.second.root / f"first_{encoding}"

    def mixed(self, one: str, other: str) -> list[Path]:
        return [*self.first.tables(one), self.about_first(other)]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Caches:
    return Caches(tmp_path_factory.mktemp("caches"))


def step_of(
    caches: Caches, tables: list[Path], config: KdConfig, indices: list[int], *, packing: bool
) -> tuple[Tensor, Any]:
    """The loss of some rows, by the way of a run, and the model with its gradients."""
    dataset = open_data_sets(tables, split="train")
    data = TrainingData(dataset, None, VOCAB_SIZE, 0, VOCAB_SIZE, packing=packing)
    rows, collate = config.batches(data)
    model = LlamaForCausalLM.from_pretrained(caches.student)
    heads = teacher_heads_of(dataset, CPU, VOCAB_SIZE)
    head = next(iter(heads.values()), None)
    step = Step(model, model, torch.float32, head, None, 1000, 0.0, teacher_heads=heads)
    (term,) = config.terms(collate([rows[index] for index in indices]), step)
    torch.autograd.backward(term.total)
    return term.total, model


def logits_of(model: Any, row: Any) -> Tensor:
    ids_1T = torch.from_numpy(row["input_ids_T"].astype("int64"))[None]
    logits_TV: Tensor = model(ids_1T).logits[0, :-1]
    return logits_TV


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
def test_a_teacher_mixed_with_itself_is_that_teacher(caches: Caches, kind: str) -> None:
    tables = caches.first.tables("exact")
    twice = KdConfig.model_validate({"mixture": {"kind": kind, "weights": [3, 1]}})
    alone, one = step_of(caches, tables, KdConfig(), [0, 1, 2], packing=False)
    mixed, other = step_of(caches, [*tables, tables[1]], twice, [0, 1, 2], packing=False)
    # the entropy of a geometric mixture is that of stored states, of a teacher the stored one
    assert mixed.item() == pytest.approx(alone.item(), rel=1e-4)
    for here, there in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(here.grad, there.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
@pytest.mark.parametrize("encoding", ["exact", "exact_int8"])
def test_cached_is_live(caches: Caches, kind: str, encoding: str) -> None:
    """All three models whole by transformers, dense [T, V] and autograd, row by row; then packed.

    Rows of the first documents learn from both teachers, of the second from theirs alone.
    """
    tables = [*caches.mixed(encoding, "exact"), *caches.second.tables("exact")]
    objective: Any = {"weight": 0.7, "mixture": {"kind": kind, "weights": [3, 1]}}
    config = KdConfig(**objective)
    dataset = open_data_sets(tables, split="train")
    indices = [19, 0, 3, 20, 7]
    live = LlamaForCausalLM.from_pretrained(caches.student)
    one, other = (LlamaForCausalLM.from_pretrained(folder).eval() for folder in caches.teachers)
    total = torch.zeros(())
    for index in indices:
        row = dataset[index]
        with torch.no_grad():
            p, q = (logits_of(teacher, row).log_softmax(-1) for teacher in (one, other))
        s = logits_of(live, row).log_softmax(-1)
        if index >= 18:
            kl = (q.exp() * (q - s)).sum()
        elif kind == "geometric":
            both = (0.75 * p + 0.25 * q).log_softmax(-1)
            kl = (both.exp() * (both - s)).sum()
        else:
            kl = 0.75 * (p.exp() * (p - s)).sum() + 0.25 * (q.exp() * (q - s)).sum()
        next_T1 = torch.from_numpy(row["input_ids_T"].astype("int64"))[1:, None]
        total = total + 0.7 * kl - 0.3 * s.gather(1, next_T1).sum()
    torch.autograd.backward(total)
    tolerance = 1e-3 if encoding == "exact" else 2e-2
    for packing in (False, True):
        loss, model = step_of(caches, tables, config, indices, packing=packing)
        torch.testing.assert_close(loss, total, rtol=tolerance, atol=0.0)
        for (what, p), expected in zip(model.named_parameters(), live.parameters(), strict=True):
            apart = (p.grad - expected.grad).norm() / expected.grad.norm()
            assert float(apart) < 5 * tolerance, what


@pytest.mark.parametrize("encoding", ["threshold", "threshold_tau", "top_k", "exact"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_of_two_data_sets_is_the_sum_of_both(
    caches: Caches, encoding: str, packing: bool
) -> None:
    """Whatever the order of rows; encodings and heads differ."""
    config = KdConfig(weight=0.8)
    first, second = caches.first.tables(encoding), caches.second.tables("exact")
    chosen = [0, 4, 1]
    total, gradients = torch.zeros(()), []
    for tables in (first, second):
        dataset = open_dataset(tables, split="train")
        collate = config.batches(TrainingData(dataset, None, VOCAB_SIZE, 0, VOCAB_SIZE)).collate
        model = LlamaForCausalLM.from_pretrained(caches.student)
        head = teacher_head_of(dataset, CPU, VOCAB_SIZE)
        step = Step(model, model, torch.float32, head, None, 1000, 0.0)
        (term,) = config.terms(collate([dataset[index] for index in chosen]), step)
        torch.autograd.backward(term.total)
        total = total + term.total.detach()
        gradients.append([p.grad for p in model.parameters()])
    indices = [18, 0, 18 + 4, 1, 4, 18 + 1]
    found, together = step_of(caches, [*first, *second], config, indices, packing=packing)
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-5)
    for p, a, b in zip(together.parameters(), *gradients, strict=True):
        torch.testing.assert_close(p.grad, a + b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("changed", [1, 2, 4])
def test_a_changed_entry_reaches_its_own_row_alone(
    caches: Caches, changed: int, tmp_path: Path
) -> None:
    """Of the second table of a mixture, and of another data set's table."""
    tables = [*caches.mixed("top_k", "threshold_tau"), *caches.second.tables("exact")]
    config = KdConfig.model_validate({"loss": "kd", "mixture": MIXTURE})
    indices = [18, 0, 19, 1]
    student = LlamaForCausalLM.from_pretrained(caches.student)

    def step(folders: list[Path]) -> Any:
        dataset = open_data_sets(folders, split="train")
        return train_one_step(config, dataset, None, student, None, indices=indices)

    before = step(tables)
    target = before.rows[1] if changed < 3 else before.rows[2]
    manifest = read_manifest(tables[changed])
    table = TABLES[manifest.table, manifest.variant]
    change = next(iter(CHANGES["teacher_logits", manifest.variant].values()))
    places: list[int] = []

    def at_last_place(row: Any) -> Any:
        places.append(places_of(row)[1])
        return change(row, places[-1])

    assert table.name == "teacher_logits"
    write_changed(tables[changed], tmp_path / "out", target["sample_id"], at_last_place)
    folders = [*tables[:changed], tmp_path / "out", *tables[changed + 1 :]]
    after = step(folders)
    moved = changed_places(before, after)
    assert list(moved) == [(sequence_of(target["input_ids_T"]), places[0])]
    assert any(not torch.equal(w, after.weights[name]) for name, w in before.weights.items())


def test_held_out_means_are_those_of_each_data_set_by_itself(caches: Caches) -> None:
    model = LlamaForCausalLM.from_pretrained(caches.student)

    def measured(dataset: Any) -> dict[str, float]:
        heads = teacher_heads_of(dataset, CPU, VOCAB_SIZE)
        head = teacher_head_of(dataset, CPU, VOCAB_SIZE)
        held_out = HeldOut(dataset, head, OPTIONS, "float32", num_token_ids=VOCAB_SIZE)
        return measure_student(model, replace(held_out, teacher_heads=heads))

    both = [caches.first.tables("threshold"), caches.second.tables("exact")]
    found = measured(open_data_sets([*both[0], *both[1]], split="heldout"))
    apart = [measured(open_dataset(tables, split="heldout")) for tables in both]
    counts = [each["tokens"] for each in apart]
    assert found["tokens"] == sum(counts)
    for name in ("kl_to_teacher", "cross_entropy", "teacher_cross_entropy"):
        mean = sum(n * each[name] for n, each in zip(counts, apart, strict=True)) / sum(counts)
        assert found[name] == pytest.approx(mean, rel=1e-5), name


def run(caches: Caches, tables: list[Path], out: Path, objective: Any, **settings: Any) -> Any:
    config = TrainConfig.model_validate(
        {"objective": {"loss": "kd", **objective}, "lr": 5e-3, "max_steps": 12} | settings
    )
    return train(config, student=caches.student, data=tables, output=out, options=OPTIONS)


@pytest.mark.slow
def test_a_run_brings_the_student_to_its_teachers(caches: Caches, tmp_path: Path) -> None:
    """And its steps do not depend on how rows fall into batches."""
    tables = [*caches.mixed("threshold", "top_k"), *caches.second.tables("exact")]
    results = [
        run(
            caches,
            tables,
            tmp_path / f"{size}",
            {"mixture": MIXTURE},
            per_device_batch_size=size,
            gradient_accumulation_steps=12 // size,
        )
        for size in (12, 3)
    ]
    before, after = (results[0].metrics[when] for when in ("before", "after"))
    assert after["kl_to_teacher"] < before["kl_to_teacher"] - 0.1
    assert results[0].metrics["train"]["rows_without_partner"] == 0
    one, other = ([e["loss"] for e in each.history if "loss" in e] for each in results)
    assert one == pytest.approx(other, rel=1e-4)


def test_rows_that_one_teacher_lacks_are_left_out_and_counted(
    caches: Caches, tmp_path: Path
) -> None:
    kept = [document for document in make_documents() if len(document.input_ids_T) != 9]
    few = tmp_path / "few"
    write_signals(caches.second, "top_k", kept, few)
    tables = [*caches.first.tables("exact"), few, *caches.second.tables("exact")]
    dataset = open_data_sets(tables, split="train")
    assert isinstance(dataset, SeveralDatasets)
    assert dataset.num_missing == 2 and len(dataset) == 16 + 6
    with pytest.raises(RejectLimitError, match="2 of 18 train rows of"):
        run(caches, tables, tmp_path / "out", {"mixture": MIXTURE})
    result = run(caches, tables, tmp_path / "out", {"mixture": MIXTURE}, max_missing_fraction=0.2)
    assert result.metrics["train"]["rows_without_partner"] == 2


def test_ids_of_another_tokenizer_are_refused(caches: Caches, tmp_path: Path) -> None:
    """In a second data set, and in a second teacher's table."""
    for source in (caches.second.documents, caches.about_first("top_k")):
        other = tmp_path / source.name
        shutil.copytree(source, other)
        manifest = replace(read_manifest(source), tokenizer="f" * 64, vocabulary="e" * 64)
        write_manifest(other, manifest)
        with pytest.raises(IdentityMismatch, match="holds ids of tokenizer ffffffffffff") as error:
            open_data_sets([*caches.first.tables("exact"), other])
        assert "\n" not in str(error.value)


def test_one_data_set_is_what_open_dataset_gives(caches: Caches) -> None:
    for tables in (caches.first.tables("top_k"), caches.first.tables("top_k")[::-1]):
        found, expected = open_data_sets(tables), open_dataset(tables)
        assert type(found) is type(expected) and len(found) == len(expected)
        assert found[3].keys() == expected[3].keys()
        assert found[3]["sample_id"] == expected[3]["sample_id"]


ROWS, EXACT, TOP_K = ("documents", ""), ("teacher_logits", "exact"), ("teacher_logits", "top_k")
CHATS = ("conversations", "")


@pytest.mark.parametrize(
    ("objective", "tables", "said"),
    [
        ({}, [ROWS, EXACT, EXACT], "2 of its tables are teacher_logits about the same rows"),
        ({"mixture": MIXTURE}, [ROWS, EXACT], "has 2 weights, and no rows have more than one"),
        ({"mixture": MIXTURE}, [ROWS, EXACT, CHATS, EXACT], "no rows have more than one"),
        ({"mixture": MIXTURE}, [ROWS, EXACT, EXACT, EXACT], "3 of its tables are teacher_logits"),
        (
            {"mixture": MIXTURE | {"kind": "geometric"}},
            [ROWS, EXACT, TOP_K],
            "one of the teacher_logits is of encoding top_k, where a token that is not kept has",
        ),
        ({}, [ROWS, EXACT, CHATS], "no teacher_logits stand behind number 3, conversations"),
        ({}, [ROWS, CHATS, EXACT], "no teacher_logits stand behind number 1, documents"),
        ({}, [EXACT, ROWS, CHATS, EXACT], "it begins with teacher_logits and has 2 tables of rows"),
        ({"temperature": 2}, [ROWS, EXACT, CHATS, TOP_K], "the teacher_logits are of encoding top"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_in_one_line(
    objective: dict[str, Any], tables: list[tuple[str, str]], said: str
) -> None:
    config = KdConfig.model_validate({"loss": "kd", **objective})
    with pytest.raises(ConfigError) as error:
        config.require(tables, [])
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("objective", "tables"),
    [
        ({}, [ROWS, EXACT, CHATS, TOP_K]),
        ({}, [ROWS, EXACT, ROWS, EXACT]),
        ({"mixture": MIXTURE}, [EXACT, ROWS, TOP_K]),
        ({"mixture": MIXTURE}, [ROWS, TOP_K, TOP_K, CHATS, EXACT]),
        ({"mixture": MIXTURE | {"kind": "geometric"}}, [ROWS, EXACT, EXACT, CHATS, TOP_K]),
        ({"temperature": 2}, [ROWS, EXACT, CHATS, EXACT]),
    ],
)
def test_what_can_be_taught_is_taken(
    objective: dict[str, Any], tables: list[tuple[str, str]]
) -> None:
    KdConfig.model_validate({"loss": "kd", **objective}).require(tables, [])


@pytest.mark.parametrize(
    "mixture",
    [
        {"kind": "harmonic", "weights": [1, 1]},
        {"kind": "arithmetic", "weights": [1]},
        {"kind": "arithmetic", "weights": [1, 0]},
        {"kind": "arithmetic", "weights": [1, -1]},
    ],
)
def test_mixtures_without_sense_are_refused(mixture: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="mixture"):
        KdConfig.model_validate({"loss": "kd", "mixture": mixture})


def test_a_mixture_has_no_other_divergence() -> None:
    settings = {"loss": "kd", "mixture": MIXTURE, "temperature": 2.0}
    with pytest.raises(ValueError, match="leave divergence and temperature out"):
        KdConfig.model_validate(settings)


def test_trainers_of_others_take_one_teacher(caches: Caches) -> None:
    with pytest.raises(ConfigError, match="mixture: several teachers at once are for the train"):
        distillation(caches.mixed("exact", "exact"), caches.student, mixture=MIXTURE)


def test_runs_without_a_mixture_keep_their_names() -> None:
    body = {"stage": "train", "student": "s", "data": ["d"], "max_steps": 2}
    plain = TrainStage.model_validate(body).hashed()["config"]["objective"]
    assert plain == {"loss": "kd", "weight": 1.0}
    objective = {"loss": "kd", "mixture": MIXTURE}
    hashed = TrainStage.model_validate(body | {"objective": objective}).hashed()
    assert hashed["config"]["objective"]["mixture"] == {"kind": "arithmetic", "weights": [3, 1]}


def job_of(caches: Caches, output: Path) -> TrainingJob:
    tables = [*caches.mixed("threshold_tau", "top_k"), *caches.second.tables("exact")]
    config = TrainConfig.model_validate(
        {
            "objective": {"loss": "kd", "weight": 0.8, "mixture": MIXTURE},
            "max_steps": 8,
            "lr": 3e-3,
            "per_device_batch_size": 4,
            "packing": True,
        }
    )
    return TrainingJob(
        config=config,
        student=caches.student,
        data=tuple(tables),
        output=output,
        fingerprint="the same",
        options=TrainOptions(num_workers=1, log_every=1, checkpoint_every=3),
    )


def losses_of(job: TrainingJob) -> list[float]:
    record = read_checkpoint(job.output)
    assert record is not None
    return [entry["loss"] for entry in record.history if "loss" in entry]


@pytest.mark.slow
def test_two_processes_and_a_stopped_run_take_the_same_steps(
    caches: Caches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are read in loader workers; the run is stopped behind its first checkpoint."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone, together, stopped = (job_of(caches, tmp_path / name) for name in ("1", "2", "stopped"))
    alone.carry_out(lambda event: None)
    train_in_processes(together, 2, lambda event: None)
    assert losses_of(together) == pytest.approx(losses_of(alone), rel=1e-5)

    def stop(event: dict[str, Any]) -> None:
        if event.get("step") == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        stopped.carry_out(stop)
    stopped.carry_out(lambda event: None)
    assert losses_of(stopped) == losses_of(alone) and len(losses_of(alone)) == 8
