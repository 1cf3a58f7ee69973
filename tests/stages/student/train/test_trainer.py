"""Training from shards alone: it learns, resumes, counts tokens, and refuses what does not fit."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.errors import (
    ConfigError,
    RejectLimitError,
)
from schemas.tables.documents import DOCUMENTS
from stages.models.checkpoints.checkpoint import damaged_files, read_checkpoint
from stages.student.evaluate.positions import evaluate
from stages.student.objectives.cross_entropy import CrossEntropyConfig
from stages.student.objectives.kd import KdConfig
from stages.student.options import TrainOptions
from stages.student.train.arguments import training_arguments
from stages.student.train.stage import TrainConfig
from stages.student.train.work import TrainResult, train
from tests.fixtures.cached_data import (
    VOCAB_SIZE,
    CachedData,
    make_cached_data,
    make_documents,
    write_table,
)
from tests.fixtures.tiny_recipe import Said, finish
from tests.runs.test_cached_equals_live import watched
from tests.servers.warm_python import WarmProcess

OPTIONS = TrainOptions(num_workers=0, log_every=1, checkpoint_every=3)
CONFIG = TrainConfig(max_steps=8, lr=3e-3, per_device_batch_size=4, objective=KdConfig(weight=0.5))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def own_data(data: CachedData, tmp_path: Path) -> CachedData:
    """A copy that a test may damage."""
    shutil.copytree(data.root, tmp_path / "own")
    root = tmp_path / "own"
    return CachedData(root, root / "teacher", root / "student")


def run(
    data: CachedData,
    output: Path,
    config: TrainConfig = CONFIG,
    encoding: str = "threshold",
    **more: Any,
) -> TrainResult:
    tables = data.tables(encoding)
    return train(config, student=data.student, data=tables, output=output, options=OPTIONS, **more)


def losses(result: TrainResult) -> list[float]:
    return [entry["loss"] for entry in result.history]


@pytest.mark.parametrize("encoding", ["threshold", "top_k", "exact"])
def test_the_student_comes_nearer_to_the_teacher(
    data: CachedData, tmp_path: Path, encoding: str
) -> None:
    config = CONFIG.model_copy(update={"max_steps": 30, "objective": KdConfig(weight=1.0)})
    events: list[dict[str, Any]] = []
    result = run(data, tmp_path / "out", config, encoding, on_event=events.append)
    before, after = result.metrics["before"], result.metrics["after"]
    assert after["kl_to_teacher"] < before["kl_to_teacher"] - 0.05
    assert [event["event"] for event in events] == ["before", "start", *["step"] * 30, "after"]
    assert events[2]["max_steps"] == 30
    assert events[2]["kl"] == pytest.approx(events[2]["loss"], rel=1e-4)
    found = evaluate(tmp_path / "out", data.tables(encoding))
    assert found == pytest.approx(after, rel=1e-5)


def test_the_output_is_an_ordinary_model_folder(data: CachedData, tmp_path: Path) -> None:
    result = run(data, tmp_path / "out", fingerprint="given by the caller")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.use_cache and tokenizer("w1 w2")["input_ids"] == [1, 2]
    record = read_checkpoint(tmp_path / "out")
    assert record is not None and record.fingerprint == "given by the caller"
    assert not damaged_files(tmp_path / "out", record)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result.metrics
    assert not (tmp_path / "out" / "checkpoints").exists()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]  # not the weights' owner alone
    with (tmp_path / "out" / "model.safetensors").open("rb+") as stream:
        stream.write(b"x")
    assert "model.safetensors has changed" in damaged_files(tmp_path / "out", record)[0]


def test_a_run_of_one_step_is_not_all_warm_up(data: CachedData, tmp_path: Path) -> None:
    run(data, tmp_path / "out", CONFIG.model_copy(update={"max_steps": 1}))
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (data.student, tmp_path / "out")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)
    args = training_arguments(CONFIG, OPTIONS, tmp_path / "args")
    for steps in range(2, 200):  # longer runs are as they were
        assert args.get_warmup_steps(steps) == math.ceil(steps * CONFIG.warmup)


def test_a_finished_run_is_not_repeated(data: CachedData, tmp_path: Path) -> None:
    first = run(data, tmp_path / "out")
    events: list[dict[str, Any]] = []
    assert run(data, tmp_path / "out", on_event=events.append) == first and not events


def test_a_teacher_that_is_the_student_has_no_divergence(data: CachedData) -> None:
    """Any slip of one position between shard and hidden state would show as several nats."""
    found = evaluate(data.teacher, data.tables("exact"))
    assert abs(found["kl_to_teacher"]) < 2e-3  # hidden states and entropies are float16
    assert found["cross_entropy"] == pytest.approx(found["teacher_cross_entropy"], abs=2e-3)
    assert found["top1_agreement"] == 1.0
    assert found["perplexity"] == pytest.approx(math.exp(found["cross_entropy"]))


def test_evaluation_does_not_depend_on_batches_or_padding(data: CachedData) -> None:
    alone = evaluate(data.student, data.tables("threshold"), batch_size=1)
    together = evaluate(data.student, data.tables("threshold"), batch_size=6)
    assert together == pytest.approx(alone, rel=1e-5)


def test_documents_alone_train_by_cross_entropy(data: CachedData, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"objective": CrossEntropyConfig()})
    result = train(
        config,
        student=data.student,
        data=[data.documents],
        output=tmp_path / "out",
        options=OPTIONS,
    )
    assert "kl_to_teacher" not in result.metrics["after"]
    assert losses(result)[-1] < losses(result)[0]


def test_accumulated_batches_weigh_tokens_not_batches(data: CachedData, tmp_path: Path) -> None:
    """Rows of 2 to 24 tokens: a mean of batch means would be elsewhere by several per cent."""
    whole = run(data, tmp_path / "whole", CONFIG.model_copy(update={"per_device_batch_size": 6}))
    split = {"per_device_batch_size": 1, "gradient_accumulation_steps": 6}
    parts = run(data, tmp_path / "parts", CONFIG.model_copy(update=split))
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_logits_of_a_batch_are_never_made(
    data: CachedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    widths = []
    linear = torch.nn.functional.linear

    def watched(values: Any, weight: Any, bias: Any = None) -> Any:
        if len(weight) == VOCAB_SIZE and values.ndim == 3:
            widths.append(values.shape[1])
        return linear(values, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    config = CONFIG.model_copy(update={"max_steps": 2, "gradient_checkpointing": checkpointing})
    run(data, tmp_path / "out", config, heldout=False)
    assert widths[0] == 16 and set(widths[1:]) == {1}  # 16: the check of the head at the start


def test_bfloat16_trains_float32_weights(data: CachedData, tmp_path: Path) -> None:
    wide = run(data, tmp_path / "wide")
    narrow = run(data, tmp_path / "narrow", CONFIG.model_copy(update={"dtype": "bfloat16"}))
    assert losses(narrow) == pytest.approx(losses(wide), rel=0.02)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    assert model.dtype == torch.float32


class Stopped(Exception):
    """What a test throws from ``on_event`` to stop a run."""


def stop_after(step: int) -> Any:
    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            raise Stopped

    return on_event


@pytest.mark.slow
def test_a_stopped_run_resumes_with_the_same_losses(data: CachedData, tmp_path: Path) -> None:
    """Stopped at 7, last checkpoint at 6, inside the second epoch of 5 steps: equal bit for bit."""
    config = CONFIG.model_copy(update={"max_steps": 10})
    whole = run(data, tmp_path / "whole", config)
    with pytest.raises(Stopped):
        run(data, tmp_path / "out", config, on_event=stop_after(7))
    assert read_checkpoint(tmp_path / "out") is None
    torn = tmp_path / "out" / "checkpoints" / "checkpoint-9"
    shutil.copytree(tmp_path / "out" / "checkpoints" / "checkpoint-6", torn)
    (torn / "trainer_state.json").write_text("{")  # killed while writing it
    events: list[dict[str, Any]] = []
    resumed = run(data, tmp_path / "out", config, on_event=events.append)
    assert events[1] == {"event": "start", "step": 6, "max_steps": 10}
    assert losses(resumed) == losses(whole)
    assert resumed.metrics["after"] == whole.metrics["after"]
    records = [read_checkpoint(tmp_path / name) for name in ("out", "whole")]
    assert len({record.files["model.safetensors"] for record in records if record}) == 1


def test_checkpoints_of_another_run_are_not_resumed(data: CachedData, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(data, tmp_path / "out", on_event=stop_after(4))
    other = CONFIG.model_copy(update={"lr": 1e-3})
    with pytest.raises(ConfigError, match=r"holds training .* choose another output folder"):
        run(data, tmp_path / "out", other)
    run(data, tmp_path / "out", other, resume=False)
    with pytest.raises(ConfigError, match="holds training"):
        run(data, tmp_path / "out")


def test_rows_without_a_partner_are_counted(own_data: CachedData, tmp_path: Path) -> None:
    """Two documents that the teacher's table lacks: left out, and said."""
    documents = make_documents()
    train_rows = [document for document in documents if document.split == "train"]
    turned = [replace(row, input_ids_T=row.input_ids_T[::-1]) for row in train_rows[:2]]
    extra = [replace(row, sample_id=row.hashed_id) for row in turned]
    shutil.rmtree(own_data.documents)
    bound = DOCUMENTS.bind(vocab_size=VOCAB_SIZE)
    write_table(own_data.documents, bound, [*documents, *extra], own_data.teacher)
    events: list[dict[str, Any]] = []
    result = run(own_data, tmp_path / "out", on_event=events.append)
    assert result.metrics["train"]["rows_without_partner"] == 2.0
    assert events[0] == {"event": "rows", "rows": len(train_rows), "missing": 2}


def test_tables_of_which_few_rows_belong_together_are_refused(
    own_data: CachedData, tmp_path: Path
) -> None:
    documents = make_documents()
    train_rows = [document for document in documents if document.split == "train"]
    turned = [replace(row, input_ids_T=row.input_ids_T[::-1]) for row in train_rows]
    extra = [replace(row, sample_id=row.hashed_id) for row in turned]
    shutil.rmtree(own_data.documents)
    bound = DOCUMENTS.bind(vocab_size=VOCAB_SIZE)
    write_table(own_data.documents, bound, [*documents, *extra], own_data.teacher)
    rows = f"{len(extra)} of {2 * len(extra)} train rows"
    with pytest.raises(RejectLimitError, match=rf"{rows} .*max_missing_fraction \(0.1\) allows"):
        run(own_data, tmp_path / "out")
    most = CONFIG.model_copy(update={"max_missing_fraction": 0.5})
    assert run(own_data, tmp_path / "out", most).history


def test_max_steps_or_epochs_but_not_both() -> None:
    with pytest.raises(ValueError, match="either 'max_steps' or 'epochs'"):
        TrainConfig()
    with pytest.raises(ValueError, match="either 'max_steps' or 'epochs'"):
        TrainConfig(max_steps=1, epochs=1.0)


KILL_ITSELF = """
import json, os, sys
from pathlib import Path
from stages.student.objectives.kd import KdConfig
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train

def on_event(event):
    if event["event"] == "step" and event["step"] == int(sys.argv[3]):
        os.kill(os.getpid(), 9)

root = Path(sys.argv[1])
config = TrainConfig(max_steps=10, lr=3e-3, per_device_batch_size=4, objective=KdConfig(weight=0.5))
options = TrainOptions(num_workers=1, log_every=1, checkpoint_every=2)
for output in sys.argv[2].split(","):
    result = train(config, student=root / "student", data=[root / "documents", root / "top_k"],
                   output=Path(output), options=options, on_event=on_event)
    print(json.dumps([entry["loss"] for entry in result.history]))
"""


@pytest.mark.slow
def test_a_killed_process_resumes_with_the_same_losses(data: CachedData, tmp_path: Path) -> None:
    """The last process resumes the run, and then makes a whole one to compare it with."""

    def trained(kill_at: int, *outputs: str) -> Said:
        folders = ",".join(str(tmp_path / output) for output in outputs)
        words = ["-c", str(data.root), folders, str(kill_at)]
        return finish(WarmProcess(KILL_ITSELF, words, dict(os.environ)))

    for kill_at in (3, 7):
        assert trained(kill_at, "killed").code == -9
    said = trained(-1, "killed", "whole")
    assert said.code == 0, said.err
    resumed, whole = map(json.loads, said.out.splitlines())
    assert resumed == whole


@pytest.fixture(scope="module")
def watched_runs(
    data: CachedData, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[CachedData, dict[str, Any]]]:
    """By encoding: data of its own, and what a process that trained on it opened."""
    own, jobs = [], []
    for encoding in ("threshold", "exact"):
        folder = tmp_path_factory.mktemp("watched")
        root = shutil.copytree(data.root, folder / "own")
        own.append(CachedData(root, root / "teacher", root / "student"))
        job = {
            "config": {"max_steps": 3, "per_device_batch_size": 4},
            "student": str(root / "student"),
            "data": [str(root / "documents"), str(root / encoding)],
            "lm_data": [],
            "output": str(folder / "out"),
        }
        jobs.append(job)
    found = zip(own, watched(jobs), strict=True)
    return dict(zip(("threshold", "exact"), found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["threshold", "exact"])
def test_training_imports_no_engine_and_opens_no_teacher_file(
    watched_runs: dict[str, tuple[CachedData, dict[str, Any]]], tmp_path: Path, encoding: str
) -> None:
    own_data, report = watched_runs[encoding]
    student_weights = [path for path in report["opened"] if "student" in path]
    assert report["engines"] == []
    assert student_weights and not [p for p in report["opened"] if str(own_data.teacher) in p]
    shutil.rmtree(own_data.teacher)
    run(own_data, tmp_path / "again", encoding=encoding)
