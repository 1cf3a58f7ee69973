"""Preference pairs exported to TRL: its DPOTrainer, installed, has our loss and our gradients."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from torch import Tensor
from transformers import LlamaForCausalLM

from pipeline.exports.export import export_tables
from schemas.dataset import open_dataset
from schemas.errors import ConfigError
from stages.student.batches.pairs import DpoCollator
from stages.student.losses.step import Step
from stages.student.objectives.dpo import DpoConfig
from tests.fixtures.cached_data import VOCAB_SIZE
from tests.fixtures.preference_data import PreferenceData, make_preference_data

BETA = 0.3
NUM_PAIRS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreferenceData:
    return make_preference_data(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def exported(data: PreferenceData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "pairs"
    written, _ = export_tables(data.dpo, "trl-dpo", folder, split=None, k=None)
    assert written.rows == {"train": NUM_PAIRS, "heldout": 4}
    return folder


class CachedPairs(trl.DPOTrainer):  # type: ignore[misc]  # TRL is untyped
    """As docs/guides/exports.md says it."""

    def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *arguments: Any) -> Any:
        return dataset


def trainer_of(model: Any, exported: Path, scratch: Path) -> Any:
    args = trl.DPOConfig(
        output_dir=str(scratch),
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=NUM_PAIRS,
        max_steps=1,
        learning_rate=1e-3,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = datasets.load_from_disk(str(exported))
    return CachedPairs(model=model, args=args, train_dataset=rows["train"])


def our_loss(model: Any, data: PreferenceData) -> Tensor:
    dataset = open_dataset(data.dpo, split="train")
    batch = DpoCollator(VOCAB_SIZE)([dataset[index] for index in range(len(dataset))])
    step = Step(
        model=model,
        bare=model,
        dtype=torch.float32,
        teacher_head=None,
        lm_teacher_head=None,
        micro_batch_tokens=200,
        progress=0.0,
    )
    (term,) = DpoConfig(beta=BETA).terms(batch, step)
    assert isinstance(term.total, Tensor)
    return term.weight * term.total / NUM_PAIRS


def test_trl_has_our_loss_and_our_gradients(
    data: PreferenceData, exported: Path, tmp_path: Path
) -> None:
    """Float32 on both sides: the loss to 1e-5 of its value, gradients to 1e-4 of the largest."""
    model = LlamaForCausalLM.from_pretrained(data.student, dtype=torch.float32)
    trainer = trainer_of(model, exported, tmp_path)
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["ref_chosen_logps"]) == NUM_PAIRS
    theirs, ours = trainer.compute_loss(trainer.model, batch), our_loss(model, data)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)
    assert ours.item() != pytest.approx(torch.tensor(2.0).log().item(), rel=0.05)
    parameters = list(model.parameters())
    for own, other in zip(
        torch.autograd.grad(ours, parameters),
        torch.autograd.grad(theirs, parameters),
        strict=True,
    ):
        torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-4 * own.abs().max().item())


def test_a_training_step_of_trl_logs_our_loss(
    data: PreferenceData, exported: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(data.student, dtype=torch.float32)
    wanted = our_loss(model, data).item()
    found = trainer_of(model, exported, tmp_path).train()
    assert found.global_step == 1
    assert found.training_loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("tables", [("pairs",), ("pairs", "signals_top_k")])
def test_other_tables_are_refused(
    data: PreferenceData, tmp_path: Path, tables: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match="expected preference_pairs and response_logprobs"):
        export_tables(
            [data.root / name for name in tables], "trl-dpo", tmp_path / "out", split=None, k=None
        )
    with pytest.raises(ConfigError, match="expected two: one of token ids"):
        export_tables(
            data.dckd("top_k"), "parquet", tmp_path / "out", split=None, k=None
        )  # of two responses, end to end
    assert list(tmp_path.iterdir()) == []
