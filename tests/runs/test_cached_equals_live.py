"""A cached run is a live run: the loss curves of both ICL objectives, teacher in memory or not.

The live trainer is given episodes and text alone. It runs the teacher at every step and computes
both losses by dense formulas in float32, one sequence at a time: it shares the order of the rows
and the optimizer with the product, and no formula.

Tolerances, relative, at each of 8 steps. The ``exact`` encoding stores hidden states and entropies
as float16, 11 significant bits: one entropy of 4 nats is off by up to 0.001, a logit by as much,
and over the 100 positions of a step such errors average to about 0.0001 nats of a loss of 4 to 8.
BiAlign's curve was 2e-5 off at most, so 1e-4. A cross-entropy needs no entropy and ICL-D's text has
a small weight: 1e-6 was seen, 2e-5 is asked. Scores of candidates are float32, ranks are integers:
3e-7 was seen without text, 1e-5 is asked, as AdamW makes more of last bits.

Dimensions: N = candidates or subsets, P = scored positions of a sequence, V = vocabulary.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from schemas.dataset import open_dataset
from schemas.tables.episodes import Episode
from stages.models.causal_lm.model import load_student
from stages.student.objectives import ObjectiveConfig
from stages.student.objectives.bialign import BiAlignConfig
from stages.student.objectives.icl_distillation import IclDistillationConfig
from stages.student.options import TrainOptions
from stages.student.train.arguments import training_arguments
from stages.student.train.distillation_trainer import DistillationTrainer
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train
from tests.fixtures.cached_data import CachedData
from tests.fixtures.episode_data import (
    EpisodeData,
    answer_of,
    candidates_of,
    make_episode_data,
    make_episodes,
    prompt_of,
    subset_prompt,
)

CPU = torch.device("cpu")
OPTIONS = TrainOptions(num_workers=0, log_every=1, micro_batch_tokens=400)
EPISODES = {episode.sample_id: episode for episode in make_episodes()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EpisodeData:
    return make_episode_data(tmp_path_factory.mktemp("cache"), encodings=("exact",))


def config_of(objective: ObjectiveConfig) -> TrainConfig:
    return TrainConfig(max_steps=8, lr=3e-3, per_device_batch_size=4, objective=objective)


def log_softmax_of(model: Any, ids: Sequence[int]) -> Tensor:
    """[P, V] of the positions that predict ``ids[1:]``."""
    logits_PV: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1]
    return logits_PV.log_softmax(-1)


def score(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """log Q: the whole sequence in one forward, its last positions picked."""
    logprobs_PV = log_softmax_of(model, [*prompt, *answer])
    return logprobs_PV[range(-len(answer), 0), list(answer)].sum()


def divergences(model: Any, teacher: Any, ids: Sequence[int]) -> Tensor:
    """KL [P] at every position."""
    with torch.no_grad():
        target_PV = log_softmax_of(teacher, ids)
    return (target_PV.exp() * (target_PV - log_softmax_of(model, ids))).sum(-1)


class LiveTrainer(DistillationTrainer):
    """The teacher in memory, ``self.live``; batches are lists of (episode, ids of a text)."""

    live: Any
    subsets: dict[str, list[list[int]]]  # the draw, which is data; its scores are computed here

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
        if isinstance(objective, BiAlignConfig):
            return self._bialign(model, [episode for episode, _ in inputs["pairs"]], objective)
        assert isinstance(objective, IclDistillationConfig)
        return self._icl(model, inputs["pairs"], objective)

    def _bialign(
        self, model: nn.Module, episodes: Sequence[Episode], config: BiAlignConfig
    ) -> Tensor:
        kl_P = torch.cat([divergences(model, self.live, e.input_ids_T.tolist()) for e in episodes])
        ranking = torch.stack([self._ranking(model, episode) for episode in episodes])
        kl = kl_P.mean() if config.kl_reduction == "mean" else kl_P.sum() / len(episodes)
        return kl + config.rank_weight * ranking.mean()

    def _ranking(self, model: nn.Module, episode: Episode) -> Tensor:
        subsets = self.subsets[episode.sample_id]
        asked = [(subset_prompt(episode, kept), answer_of(episode)) for kept in subsets]
        with torch.no_grad():
            order = torch.stack([score(self.live, *a) for a in asked]).argsort(descending=True)
        sorted_N = torch.stack([score(model, *asked[i]) for i in order.tolist()])
        spread = (sorted_N.max() - sorted_N.min()).detach()
        left_NN = (sorted_N[None, :] - sorted_N[:, None]) / spread
        place_N = torch.arange(len(order))
        right_NN = (place_N[None, :] - place_N[:, None]) / (len(order) - 1)
        return (left_NN + right_NN).clamp(min=0).triu(1).sum()

    def _icl(self, model: nn.Module, pairs: Any, config: IclDistillationConfig) -> Tensor:
        alpha = 1 - self.state.global_step / (self.state.max_steps - 1)
        icl = []
        for episode, _ in pairs:
            asked = [(prompt_of(episode), candidate) for candidate in candidates_of(episode)]
            own_N = torch.stack([score(model, *a) / len(a[1]) for a in asked]).log_softmax(0)
            with torch.no_grad():
                theirs_N = torch.stack([score(self.live, *a) / len(a[1]) for a in asked])
            soft = -(theirs_N.softmax(0) * own_N).sum()
            icl.append(-alpha * own_N[episode.gold] + (1 - alpha) * soft)
        loss = torch.stack(icl).mean()
        if config.lm_weight:
            loss = loss + config.lm_weight * self._lm(model, [ids for _, ids in pairs], alpha)
        return loss

    def _lm(self, model: nn.Module, texts: Sequence[list[int]], alpha: float) -> Tensor:
        losses = []
        for ids in texts:
            own_PV = log_softmax_of(model, ids)
            with torch.no_grad():
                target_PV = log_softmax_of(self.live, ids).exp()
            hard_P = -own_PV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            losses.append(alpha * hard_P + (1 - alpha) * -(target_PV * own_PV).sum(-1))
        return torch.cat(losses).mean()


def strip(rows: Sequence[Any]) -> dict[str, Any]:
    """Forget every signal: keep the episode (as made, not as stored) and the text's ids."""
    pairs = [row if isinstance(row, tuple) else (row, None) for row in rows]
    return {
        "pairs": [
            (EPISODES[row["sample_id"]], text["input_ids_T"].tolist() if text else None)
            for row, text in pairs
        ]
    }


def live_losses(
    data: EpisodeData, output: Path, objective: ObjectiveConfig, tables: list[Path]
) -> list[float]:
    config = config_of(objective)
    wants_text = isinstance(objective, IclDistillationConfig) and objective.lm_weight > 0
    text = open_dataset(data.text.tables("exact"), split="train") if wants_text else None
    args = training_arguments(config, OPTIONS, output)
    args.set_save(strategy="no")
    trainer = LiveTrainer(
        load_student(data.student, device=CPU),
        args,
        dataset=open_dataset(tables, split="train"),
        config=config,
        teacher_head=None,
        on_event=None,
        lm_dataset=text,
    )
    trainer.data_collator = strip
    trainer.live = LlamaForCausalLM.from_pretrained(data.text.teacher).eval()
    trainer.subsets = drawn_subsets(data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def drawn_subsets(data: EpisodeData) -> dict[str, list[list[int]]]:
    drawn = open_dataset([data.root / "preferences"])
    found = {}
    for row in (drawn[index] for index in range(len(drawn))):
        cuts = np.cumsum(row["subset_sizes_N"])[:-1]
        parts = np.split(row["subset_demonstrations_S"], cuts)
        found[row["sample_id"]] = [part.tolist() for part in parts]
    return found


def cached_losses(
    data: EpisodeData, output: Path, objective: ObjectiveConfig, tables: list[Path]
) -> list[float]:
    wants_text = isinstance(objective, IclDistillationConfig) and objective.lm_weight > 0
    result = train(
        config_of(objective),
        student=data.student,
        data=tables,
        lm_data=data.text.tables("exact") if wants_text else [],
        output=output,
        heldout=False,
        options=OPTIONS,
    )
    return [entry["loss"] for entry in result.history]


@pytest.mark.parametrize(
    ("objective", "tolerance"),
    [
        (BiAlignConfig(rank_weight=1.0), 1e-4),
        (BiAlignConfig(rank_weight=1.0, kl_reduction="mean"), 1e-4),
        (IclDistillationConfig(lm_weight=0.2), 2e-5),
        (IclDistillationConfig(lm_weight=0.0), 1e-5),
    ],
)
@pytest.mark.slow
def test_the_loss_curve_from_the_cache_is_the_live_one(
    data: EpisodeData, tmp_path: Path, objective: ObjectiveConfig, tolerance: float
) -> None:
    tables = data.bialign("exact") if objective.loss == "bialign" else data.icl
    cached = cached_losses(data, tmp_path / "cached", objective, tables)
    live = live_losses(data, tmp_path / "live", objective, tables)
    assert len(cached) == 8 and len({round(loss, 3) for loss in cached}) == 8
    assert cached == pytest.approx(live, rel=tolerance)


WATCHED = """
import json, shutil, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from pathlib import Path
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train

for job in json.loads(sys.argv[1]):
    for folder in job.get("gone", []):
        shutil.rmtree(folder)
    opened.clear()
    train(TrainConfig.model_validate(job["config"]), student=Path(job["student"]),
          data=[Path(name) for name in job["data"]],
          lm_data=[Path(name) for name in job["lm_data"]],
          output=Path(job["output"]), options=TrainOptions(num_workers=0))
    engines = [name for name in sys.modules if name.split(".")[0] in ("vllm", "ray", "pipeline")
               or name in ("stages.signals.teacher_logits.work", "stages.models.engines.engine")]
    print(json.dumps({"opened": opened, "engines": engines}))
"""


def watched(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train one job after the other in one process that writes down what each of them opens.

    What a job names as ``gone`` is removed before it begins.
    """
    command = [sys.executable, "-c", WATCHED, json.dumps(jobs)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


OBJECTIVES = ("bialign", "icl_distillation")


@pytest.fixture(scope="module")
def trained(
    data: EpisodeData, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[EpisodeData, list[dict[str, Any]]]]:
    """By objective: what was read, and reports of a run beside the teacher and of one without."""
    folder = tmp_path_factory.mktemp("trained")
    own, jobs = {}, []
    for loss in OBJECTIVES:
        root = folder / loss / "text"
        shutil.copytree(data.root, folder / loss)
        text = CachedData(root, root / "teacher", root / "student")
        own[loss] = EpisodeData(folder / loss, text)
        is_bialign = loss == "bialign"
        tables = own[loss].bialign("exact") if is_bialign else own[loss].icl
        job = {
            "config": {"max_steps": 3, "per_device_batch_size": 4, "objective": {"loss": loss}},
            "student": str(own[loss].student),
            "data": [str(path) for path in tables],
            "lm_data": [] if is_bialign else [str(path) for path in text.tables("exact")],
        }
        jobs.append(job | {"output": str(folder / loss / "watched")})
        jobs.append(job | {"output": str(folder / loss / "without"), "gone": [str(text.teacher)]})
    reports = watched(jobs)
    assert len(reports) == len(jobs)
    return {loss: (own[loss], reports[2 * i : 2 * i + 2]) for i, loss in enumerate(OBJECTIVES)}


@pytest.mark.slow
@pytest.mark.parametrize("loss", OBJECTIVES)
def test_training_opens_no_teacher_file(
    trained: dict[str, tuple[EpisodeData, list[dict[str, Any]]]], loss: str
) -> None:
    """Watched with the teacher in its place, then run once more without one."""
    own, reports = trained[loss]
    for report in reports:
        assert report["engines"] == []
        assert [path for path in report["opened"] if "student" in path]
        assert not [path for path in report["opened"] if str(own.text.teacher) in path]
    assert not own.text.teacher.exists()
