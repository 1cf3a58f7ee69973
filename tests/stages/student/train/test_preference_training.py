"""Preference runs: a cached run is a live run, learning, accumulation, resume, what is refused.

The live trainer is given pairs and responses alone. It runs both teachers at every step and
computes the losses by dense formulas, one sequence at a time: it shares the order of the rows and
the optimizer with the product, and no formula.

Tolerances, relative, at each of 8 steps. DCKD's ``exact`` table stores hidden states and entropies
as float16: see ``test_cached_equals_live``; 1e-5 was seen, 1e-4 is asked. ``exact`` advantages
store float32: 3e-7 was seen, 1e-5 is asked, as AdamW makes more of last bits. DPO's cached
log-probs are float32 sums: the same.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from schemas.dataset import open_dataset
from schemas.errors import ConfigError
from stages.models.causal_lm.model import load_student
from stages.student.evaluate.positions import evaluate
from stages.student.objectives import ObjectiveConfig
from stages.student.objectives.adpa import AdpaConfig
from stages.student.objectives.dckd import DckdConfig
from stages.student.objectives.dpo import DpoConfig
from stages.student.objectives.sft import SftConfig
from stages.student.options import TrainOptions
from stages.student.train.arguments import training_arguments
from stages.student.train.distillation_trainer import DistillationTrainer
from stages.student.train.stage import TrainConfig
from stages.student.train.work import TrainResult, train
from tests.fixtures.preference_data import (
    BETA,
    PreferenceData,
    gathered,
    make_pairs,
    make_preference_data,
    response_logprobs,
    responses_of,
    sides_of,
    split_responses,
    wide_model,
    without_teachers,
)
from tests.runs.test_cached_equals_live import watched

CPU = torch.device("cpu")
OPTIONS = TrainOptions(num_workers=0, log_every=1, checkpoint_every=3, micro_batch_tokens=400)
PAIRS = {pair.sample_id: pair for pair in make_pairs()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreferenceData:
    return make_preference_data(tmp_path_factory.mktemp("cache"))


def config_of(objective: ObjectiveConfig, **more: Any) -> TrainConfig:
    settings = {"max_steps": 8, "lr": 3e-3, "per_device_batch_size": 4} | more
    return TrainConfig(objective=objective, **settings)


def tables_of(data: PreferenceData, objective: ObjectiveConfig) -> list[Path]:
    match objective:
        case SftConfig():
            return [data.pairs]
        case DpoConfig():
            return data.dpo
        case DckdConfig():
            return data.dckd("exact")
        case AdpaConfig(mode="paper"):
            return data.adpa("exact")
        case _:
            return data.adpa("as_released")


def run(data: PreferenceData, output: Path, objective: ObjectiveConfig, **more: Any) -> TrainResult:
    tables = more.pop("tables", None) or tables_of(data, objective)
    settings = more.pop("settings", {})
    config = config_of(objective, **settings)
    return train(config, student=data.student, data=tables, output=output, options=OPTIONS, **more)


def losses(result: TrainResult) -> list[float]:
    return [entry["loss"] for entry in result.history]


class LiveTrainer(DistillationTrainer):
    """Both teachers in memory; batches are lists of pairs."""

    aligned: Any
    reference: Any
    answers: dict[str, Any]  # the student's responses, which are data

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        return None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        objective = self._config.objective
        loss = {"dckd": self._dckd, "adpa": self._adpa, "dpo": self._dpo}[objective.loss]
        return torch.stack([loss(model, pair, objective) for pair in inputs["pairs"]]).mean()

    def _dckd(self, model: nn.Module, pair: Any, config: Any) -> Tensor:
        kls = []
        for side in sides_of(pair):
            own_PV = response_logprobs(model, pair.prompt_ids_T, side)
            target_PV = self._live(self.aligned, pair.prompt_ids_T, side)
            kls.append((target_PV.exp() * (target_PV - own_PV)).sum(-1).mean())
        kl = config.chosen_weight * kls[0] + config.rejected_weight * kls[1]
        loss: Tensor = config.sft_weight * self._nll(model, pair) + config.alpha * kl
        return loss

    def _adpa(self, model: nn.Module, pair: Any, config: Any) -> Tensor:
        inner = []
        for response in split_responses(self.answers[pair.sample_id]):
            probs_PV = response_logprobs(model, pair.prompt_ids_T, response).exp()
            aligned, reference = (
                self._live(teacher, pair.prompt_ids_T, response)
                for teacher in (self.aligned, self.reference)
            )
            inner.append((probs_PV * BETA * (aligned - reference)).sum(-1).mean())
        gain = torch.stack(inner).mean()
        loss: Tensor = config.sft_weight * self._nll(model, pair) - config.gamma * gain
        return loss

    def _dpo(self, model: nn.Module, pair: Any, config: Any) -> Tensor:
        ratios = []
        for side in sides_of(pair):
            own = gathered(response_logprobs(model, pair.prompt_ids_T, side), side).sum()
            theirs = gathered(self._live(self.reference, pair.prompt_ids_T, side), side).sum()
            ratios.append(own - theirs)
        return -functional.logsigmoid(config.beta * (ratios[0] - ratios[1]))

    @staticmethod
    def _nll(model: nn.Module, pair: Any) -> Tensor:
        own_PV = response_logprobs(model, pair.prompt_ids_T, pair.chosen_ids_C)
        return -gathered(own_PV, pair.chosen_ids_C).mean()

    @staticmethod
    @torch.no_grad()
    def _live(teacher: Any, prompt_T: Any, response: Any) -> Tensor:
        return response_logprobs(teacher, prompt_T, response)


def live_losses(data: PreferenceData, output: Path, objective: ObjectiveConfig) -> list[float]:
    config = config_of(objective)
    args = training_arguments(config, OPTIONS, output)
    args.set_save(strategy="no")
    trainer = LiveTrainer(
        load_student(data.student, device=CPU),
        args,
        dataset=open_dataset(tables_of(data, objective), split="train"),
        config=config,
        teacher_head=None,
        on_event=None,
    )
    trainer.data_collator = lambda rows: {"pairs": [PAIRS[row["sample_id"]] for row in rows]}
    trainer.aligned, trainer.reference = (
        LlamaForCausalLM.from_pretrained(folder).eval() for folder in (data.teacher, data.reference)
    )
    student = wide_model(data.student)
    trainer.answers = {key: responses_of(student, pair) for key, pair in PAIRS.items()}
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "tolerance"),
    [
        (DckdConfig(), 1e-4),
        (AdpaConfig(gamma=1.0), 1e-5),
        (DpoConfig(beta=0.2), 1e-5),
    ],
)
def test_the_loss_curve_from_the_cache_is_the_live_one(
    data: PreferenceData, tmp_path: Path, objective: ObjectiveConfig, tolerance: float
) -> None:
    cached = losses(run(data, tmp_path / "cached", objective, heldout=False))
    live = live_losses(data, tmp_path / "live", objective)
    assert len(cached) == 8 and len({round(loss, 3) for loss in cached}) == 8
    assert cached == pytest.approx(live, rel=tolerance)


@pytest.mark.slow
def test_the_students_learn_what_they_are_told(data: PreferenceData, tmp_path: Path) -> None:
    settings = {"max_steps": 24}
    dckd = run(data, tmp_path / "dckd", DckdConfig(chosen_weight=1.0), settings=settings)
    for name in ("kl_chosen", "kl_rejected", "cross_entropy_chosen"):
        assert dckd.history[-1][name] < dckd.history[0][name]
    assert dckd.metrics["after"]["kl_to_teacher"] < dckd.metrics["before"]["kl_to_teacher"]
    first = dckd.history[0]
    whole = first["cross_entropy_chosen"] + first["kl_chosen"] + 0.1 * first["kl_rejected"]
    assert first["loss"] == pytest.approx(whole, rel=1e-5)
    assert first["num_samples"] == 4

    adpa = run(data, tmp_path / "adpa", AdpaConfig(), settings=settings)
    assert adpa.history[-1]["advantage"] > adpa.history[0]["advantage"] + 0.1
    first = adpa.history[0]
    whole = first["cross_entropy_chosen"] - 1.6 * first["advantage"]
    assert first["loss"] == pytest.approx(whole, rel=1e-5)

    dpo = run(data, tmp_path / "dpo", DpoConfig(), settings=settings)
    assert dpo.history[-1]["reward_margin"] > dpo.history[0]["reward_margin"] + 0.1

    sft = run(data, tmp_path / "sft", SftConfig(), settings=settings)
    assert losses(sft)[-1] < losses(sft)[0]
    assert sft.metrics["before"]["cross_entropy"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("support", ["threshold", "threshold_tau", "union_top_k"])
def test_other_supports_point_the_same_way(
    data: PreferenceData, tmp_path: Path, support: str
) -> None:
    """The first step's gradients differ by the draw alone: both raise the exact advantage."""
    objective = AdpaConfig(sft_weight=0.0)
    settings = {"max_steps": 16}
    result = run(data, tmp_path / "out", objective, tables=data.adpa(support), settings=settings)
    assert result.history[-1]["advantage"] > result.history[0]["advantage"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [DckdConfig(), AdpaConfig(), AdpaConfig(mode="as_released"), DpoConfig()]
)
def test_accumulated_batches_are_one_batch(
    data: PreferenceData, tmp_path: Path, objective: ObjectiveConfig
) -> None:
    split = {"max_steps": 3, "per_device_batch_size": 1, "gradient_accumulation_steps": 4}
    whole = run(data, tmp_path / "a", objective, settings={"max_steps": 3}, heldout=False)
    parts = run(data, tmp_path / "b", objective, settings=split, heldout=False)
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-5)


class Stopped(Exception):
    """What a test throws from ``on_event`` to stop a run."""


def stop_at_four(event: dict[str, Any]) -> None:
    if event["event"] == "step" and event["step"] == 4:
        raise Stopped


@pytest.mark.slow
def test_a_stopped_run_resumes_with_the_same_losses(data: PreferenceData, tmp_path: Path) -> None:
    whole = run(data, tmp_path / "whole", AdpaConfig(), heldout=False)
    with pytest.raises(Stopped):
        run(data, tmp_path / "out", AdpaConfig(), heldout=False, on_event=stop_at_four)
    assert losses(run(data, tmp_path / "out", AdpaConfig(), heldout=False)) == losses(whole)


def test_missing_tables_and_unlike_modes_are_named(data: PreferenceData, tmp_path: Path) -> None:
    for objective, missing in (
        (DckdConfig(), "a teacher_logits"),
        (AdpaConfig(), "a responses"),
        (DpoConfig(), "a response_logprobs"),
    ):
        expected = f"'{objective.loss}' needs {missing} table, the data has: preference_pairs"
        with pytest.raises(ConfigError, match=expected):
            run(data, tmp_path / "out", objective, tables=[data.pairs])
    for mode, support in (("paper", "as_released"), ("as_released", "threshold")):
        objective = AdpaConfig.model_validate({"mode": mode})
        expected = f"mode '{mode}' cannot read advantages of support '{support}'"
        with pytest.raises(ConfigError, match=expected):
            run(data, tmp_path / "out", objective, tables=data.adpa(support))


def test_evaluation_of_pairs_measures_chosen_responses(data: PreferenceData) -> None:
    found = evaluate(data.student, data.dckd("threshold"))
    student = wide_model(data.student)
    held_out = [pair for pair in PAIRS.values() if pair.split == "heldout"]
    with torch.no_grad():
        own = [
            -gathered(response_logprobs(student, p.prompt_ids_T, p.chosen_ids_C), p.chosen_ids_C)
            for p in held_out
        ]
    assert found["tokens"] == sum(len(pair.chosen_ids_C) for pair in held_out)
    assert found["cross_entropy"] == pytest.approx(float(torch.cat(own).mean()), rel=1e-5)
    assert found["kl_to_teacher"] > 0


WATCHED_OBJECTIVES = (DckdConfig(), AdpaConfig(), DpoConfig())


@pytest.fixture(scope="module")
def trained(
    data: PreferenceData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreferenceData, dict[str, dict[str, Any]]]:
    """Data whose teachers are gone, and what training on it opened, by the loss."""
    folder = tmp_path_factory.mktemp("trained")
    own = without_teachers(data, folder / "own")
    jobs = [
        {
            "config": {
                "max_steps": 3,
                "per_device_batch_size": 4,
                "objective": objective.model_dump(mode="json"),
            },
            "student": str(own.student),
            "data": [str(path) for path in tables_of(own, objective)],
            "lm_data": [],
            "output": str(folder / objective.loss),
        }
        for objective in WATCHED_OBJECTIVES
    ]
    losses = [objective.loss for objective in WATCHED_OBJECTIVES]
    return own, dict(zip(losses, watched(jobs), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("objective", WATCHED_OBJECTIVES)
def test_training_opens_no_teacher_file(
    trained: tuple[PreferenceData, dict[str, dict[str, Any]]], objective: ObjectiveConfig
) -> None:
    """Watched while both teachers are gone: what is opened is the student and the tables."""
    own, reports = trained
    report = reports[objective.loss]
    assert report["engines"] == []
    assert [path for path in report["opened"] if "student" in path]
    gone = (f"{own.teacher}/", f"{own.reference}/")
    assert not [path for path in report["opened"] if path.startswith(gone)]
