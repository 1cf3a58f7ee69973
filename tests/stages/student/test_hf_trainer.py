"""People's own trainers on finished tables: loss and gradients of our own trainer's ``kd``."""

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from schemas.dataset import open_dataset
from schemas.errors import ConfigError, IdentityMismatch
from stages.student.batches.signals import Collator
from stages.student.batches.training_data import teacher_head_of
from stages.student.hf_trainer import distillation
from stages.student.losses.step import Step
from stages.student.objectives.kd import KdConfig
from tests.fixtures.cached_data import VOCAB_SIZE, CachedData, make_cached_data, save_model
from tests.house.tree import REPOSITORY
from tests.servers.warm_python import WarmProcess

pytestmark = pytest.mark.slow

ENCODINGS = ("threshold", "threshold_tau", "top_k", "exact", "exact_int8")
CPU = torch.device("cpu")
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Keeps the first step's gradients, as they are before clipping."""

    def __init__(self) -> None:
        self.gradients: Gradients = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        self.gradients = self.gradients or found


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        **settings,
    }


def step_of(trainer: Trainer) -> tuple[float, Gradients]:
    """Carry out a step; return its loss and gradients."""
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    return trainer.state.log_history[0]["loss"], watch.gradients


def our_step(student: Path, tables: list[Path], **settings: Any) -> tuple[float, Gradients]:
    """Return our trainer's loss and gradients on all rows of ``train`` at once."""
    dataset = open_dataset(tables, split="train")
    model = LlamaForCausalLM.from_pretrained(student)
    encoding: Any = dataset.manifests[1].variant
    collator = Collator(encoding, model.config.vocab_size, VOCAB_SIZE)
    batch = collator([dataset[index] for index in range(len(dataset))])
    step = Step(
        model=model,
        bare=model,
        dtype=torch.float32,
        teacher_head=teacher_head_of(dataset, CPU, VOCAB_SIZE),
        lm_teacher_head=None,
        micro_batch_tokens=1000,
        progress=0.0,
    )
    (term,) = KdConfig(**settings).terms(batch, step)
    loss = term.total / len(batch["positions_N"])
    torch.autograd.backward(loss)
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("rows", ["documents", "conversations"])
@pytest.mark.parametrize("batch", [(18, 1), (9, 2)], ids=["one batch", "two accumulated"])
def test_a_step_of_a_plain_trainer_is_ours(
    rows: str, encoding: str, batch: tuple[int, int], data: CachedData, tmp_path: Path
) -> None:
    """Rows are of many lengths, so two batches have unlike counts and padding."""
    tables = data.tables(encoding) if rows == "documents" else data.chats(encoding)
    settings = arguments(
        tmp_path, per_device_train_batch_size=batch[0], gradient_accumulation_steps=batch[1]
    )
    trainer = Trainer(
        LlamaForCausalLM.from_pretrained(data.student),
        TrainingArguments(**settings),
        **distillation(tables, data.student, weight=0.7),
    )
    assert len(trainer.train_dataset) == 18
    assert_equal_steps(step_of(trainer), our_step(data.student, tables, weight=0.7))


def test_a_step_by_another_divergence_is_ours(data: CachedData, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "weight": 0.7,
        "divergence": {"kind": "jensen_shannon", "beta": 0.3},
        "temperature": 1.5,
    }
    trainer = Trainer(
        LlamaForCausalLM.from_pretrained(data.student),
        TrainingArguments(**arguments(tmp_path, per_device_train_batch_size=18)),
        **distillation(data.tables("exact"), data.student, **settings),
    )
    assert_equal_steps(step_of(trainer), our_step(data.student, data.tables("exact"), **settings))


@pytest.mark.parametrize("batch", [(18, 1), (9, 2)], ids=["one batch", "two accumulated"])
@pytest.mark.parametrize("rows", ["documents", "conversations"])
def test_a_step_of_trls_trainer_is_ours(
    rows: str, batch: tuple[int, int], data: CachedData, tmp_path: Path
) -> None:
    from trl import SFTConfig, SFTTrainer

    tables = data.tables("threshold") if rows == "documents" else data.chats("exact")
    settings = arguments(
        tmp_path, per_device_train_batch_size=batch[0], gradient_accumulation_steps=batch[1]
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data.student, pad_token="<end>")
    trainer = SFTTrainer(
        LlamaForCausalLM.from_pretrained(data.student),
        SFTConfig(bf16=False, dataset_kwargs={"skip_prepare_dataset": True}, **settings),
        processing_class=tokenizer,
        **distillation(tables, tokenizer, weight=0.7),
    )
    assert_equal_steps(step_of(trainer), our_step(data.student, tables, weight=0.7))


def test_trls_trainer_says_what_to_set(data: CachedData, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    tokenizer = PreTrainedTokenizerFast.from_pretrained(data.student, pad_token="<end>")
    with pytest.raises(ValueError, match="'skip_prepare_dataset': True"):
        SFTTrainer(
            LlamaForCausalLM.from_pretrained(data.student),
            SFTConfig(bf16=False, **arguments(tmp_path)),
            processing_class=tokenizer,
            **distillation(data.tables("top_k"), tokenizer),
        )


PAGE = REPOSITORY / "docs/guides/own_trainer.md"


def test_the_lines_of_the_page_train(data: CachedData, tmp_path: Path) -> None:
    """The first block of code, as it stands there."""
    code = PAGE.read_text().split("```python\n")[1].partition("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    documents, signals = data.tables("threshold")
    names: dict[str, Any] = {
        "model_folder": str(data.student),
        "documents": documents,
        "signals": signals,
        "settings": arguments(tmp_path),
    }
    exec(code, names)
    assert names["trainer"].state.global_step == 1


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_model_of_more_rows_than_its_tokenizer_has_our_loss(
    encoding: str, data: CachedData, tmp_path: Path
) -> None:
    """Its softmax has all of them, and the teacher gives the others nothing."""
    save_model(tmp_path / "larger", seed=5, num_layers=1, rows=VOCAB_SIZE + 13)
    trainer = Trainer(
        LlamaForCausalLM.from_pretrained(tmp_path / "larger"),
        TrainingArguments(**arguments(tmp_path, per_device_train_batch_size=18)),
        **distillation(data.tables(encoding), tmp_path / "larger"),
    )
    expected = our_step(tmp_path / "larger", data.tables(encoding))
    assert_equal_steps(step_of(trainer), expected)


@pytest.mark.parametrize("has_datasets", [True, False])
def test_a_short_run_brings_the_held_out_loss_down(
    has_datasets: bool, data: CachedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_datasets:
        monkeypatch.setitem(sys.modules, "datasets", None)
    settings = arguments(tmp_path, max_steps=30, learning_rate=1e-2, prediction_loss_only=True)
    trainer = Trainer(
        LlamaForCausalLM.from_pretrained(data.student),
        TrainingArguments(per_device_train_batch_size=6, per_device_eval_batch_size=6, **settings),
        **distillation(data.tables("top_k"), data.student),
    )
    assert len(trainer.eval_dataset) == 6
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert trainer.evaluate()["eval_loss"] < before


def test_workers_read_the_rows(data: CachedData, tmp_path: Path) -> None:
    """Started anew they get the open tables by pickle."""
    settings = arguments(tmp_path, per_device_train_batch_size=18, dataloader_num_workers=1)
    trainer = Trainer(
        LlamaForCausalLM.from_pretrained(data.student),
        TrainingArguments(**settings),
        **distillation(data.tables("threshold"), data.student),
    )
    assert_equal_steps(step_of(trainer), our_step(data.student, data.tables("threshold")))


RANK = """
import json, sys, torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from stages.student.hf_trainer import distillation

class Save(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **others):
        self.gradients = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
        if args.process_index == 0:
            torch.save(self.gradients, out)

student, inputs, signals, out, settings = sys.argv[1:]
args = TrainingArguments(**json.loads(settings))
parts = distillation([inputs, signals], student, weight=0.7)
trainer = Trainer(LlamaForCausalLM.from_pretrained(student), args, callbacks=[Save()], **parts)
trainer.train()
if args.process_index == 0:
    print(trainer.state.log_history[0]["loss"])
"""


def test_two_processes_are_one(data: CachedData, tmp_path: Path) -> None:
    """Each has 9 of the 18 rows, with unlike counts of tokens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = arguments(tmp_path, per_device_train_batch_size=9, ddp_backend="gloo")
    places = [data.student, *data.tables("threshold"), tmp_path / "gradients.pt"]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        WarmProcess(
            RANK,
            ["rank", *map(str, places), json.dumps(settings)],
            {**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]
    said = [process.communicate() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    loss = float(said[0][0].splitlines()[-1])
    found = loss, torch.load(tmp_path / "gradients.pt")
    assert_equal_steps(found, our_step(data.student, data.tables("threshold"), weight=0.7))


def test_a_tokenizer_of_other_ids_is_refused(data: CachedData, tiny_model: Path) -> None:
    for other in (tiny_model, PreTrainedTokenizerFast.from_pretrained(tiny_model)):
        with pytest.raises(IdentityMismatch, match="train a model with the teacher's tokenizer"):
            distillation(data.tables("top_k"), other)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda data: distillation(data.tables("top_k"), data.student, weight=2), "weight: "),
        (lambda data: distillation(data.tables("top_k"), data.student, wieght=1), "wieght: "),
        (lambda data: distillation([data.documents], data.student), "needs a teacher_logits"),
        (
            lambda data: distillation(data.tables("top_k"), data.student, temperature=2.0),
            "asks for forward_kl at temperature 2, which needs whole distributions",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    asked: Callable[[CachedData], Any], said: str, data: CachedData
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        asked(data)
    assert "\n" not in str(error.value)


def test_labels_of_other_rows_are_refused(data: CachedData) -> None:
    """Rows in another order, or another collator's: never a loss of tokens with others' teacher."""
    parts = distillation(data.tables("top_k"), data.student)
    batch = parts["data_collator"]([3, 5])
    outputs = {"logits": torch.zeros(*batch["labels"].shape, VOCAB_SIZE)}
    assert float(parts["compute_loss_func"](outputs, batch["labels"])) > 0
    plain = batch["labels"].clone()
    plain[:, 0] = -100
    swapped = batch["labels"].clone()
    swapped[:, 0] = swapped[:, 0].flip(0)
    for labels in (plain, swapped):
        with pytest.raises(ConfigError, match="of one call of distillation"):
            parts["compute_loss_func"](outputs, labels)
    with pytest.raises(IdentityMismatch, match="the model has 300 logits, the data's ids need 307"):
        parts["compute_loss_func"](
            {"logits": torch.zeros(*batch["labels"].shape, 300)}, batch["labels"]
        )


def test_several_gpus_in_one_process_are_refused(data: CachedData) -> None:
    """The Trainer hands the count over once for each, and multiplies a loss of the whole batch."""
    parts = distillation(data.tables("top_k"), data.student)
    batch = parts["data_collator"]([3, 5])
    outputs = {"logits": torch.zeros(*batch["labels"].shape, VOCAB_SIZE)}
    with pytest.raises(ConfigError, match="trains on 2 GPUs at once"):
        parts["compute_loss_func"](outputs, batch["labels"], torch.tensor([[30], [30]]))
