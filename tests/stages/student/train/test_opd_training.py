"""On-policy distillation as a run: what is cached is what live models say, and what ends a run.

The live trainer is given prompts and responses alone. It runs teacher and writer at every step, one
sequence a forward, and computes the surrogate by its definition; with the product it shares the
order of the rows and the optimizer, and no formula. Cached log-probs are float32, of a float64
pass: the losses agree to 1e-5 at each of 8 steps.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from schemas.dataset import open_dataset
from schemas.errors import ConfigError, IdentityMismatch, StoreError
from schemas.storage.manifest import read_manifest, write_manifest
from schemas.tables.response_token_logprobs import RESPONSE_TOKEN_LOGPROBS
from schemas.tables.responses import RESPONSES, Responses
from stages.models.causal_lm.model import load_student
from stages.student.evaluate.positions import evaluate
from stages.student.objectives.opd import OpdConfig
from stages.student.options import TrainOptions
from stages.student.train.arguments import training_arguments
from stages.student.train.distillation_trainer import DistillationTrainer
from stages.student.train.stage import EarlyStopping, TrainConfig
from stages.student.train.work import TrainResult, train
from tests.fixtures.cached_data import VOCAB_SIZE, K, write_table
from tests.fixtures.changed_entries import write_changed
from tests.fixtures.preference_data import (
    PreferenceData,
    gathered,
    make_pairs,
    make_preference_data,
    response_logprobs,
    responses_of,
    split_responses,
    token_logprobs_of,
    wide_model,
)

CPU = torch.device("cpu")
OPTIONS = TrainOptions(num_workers=0, log_every=1)
OBJECTIVES = [
    OpdConfig(max_staleness=5.0),
    OpdConfig(max_staleness=5.0, importance="none", max_advantage=0.5),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreferenceData:
    return make_preference_data(tmp_path_factory.mktemp("cache"))


def config_of(objective: OpdConfig, **more: Any) -> TrainConfig:
    settings = {"max_steps": 8, "lr": 5e-4, "per_device_batch_size": 4} | more
    return TrainConfig(objective=objective, **settings)


def run(data: PreferenceData, output: Path, objective: OpdConfig, **more: Any) -> TrainResult:
    tables, settings = more.pop("tables", data.opd), more.pop("settings", {})
    config = config_of(objective, **settings)
    return train(config, student=data.student, data=tables, output=output, options=OPTIONS, **more)


class LiveTrainer(DistillationTrainer):
    """Teacher and writer in memory; batches are rows of responses."""

    teacher: Any
    writer: Any

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        return None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        config = self._config.objective
        assert isinstance(config, OpdConfig)
        losses = []
        for row in inputs["rows"]:
            for response in split_responses(row):
                prompt = row.prompt_ids_T
                own_A = gathered(response_logprobs(model, prompt, response), response)
                with torch.no_grad():
                    teacher_A, writer_A = (
                        gathered(response_logprobs(live, prompt, response), response)
                        for live in (self.teacher, self.writer)
                    )
                advantage_A = teacher_A - own_A.detach()
                if config.max_advantage is not None:
                    advantage_A = advantage_A.clamp(-config.max_advantage, config.max_advantage)
                if config.importance == "none":
                    losses.append(-advantage_A * own_A)
                    continue
                ratio_A = (own_A - writer_A).exp()
                bound_A = ratio_A.clamp(1 - config.clip, 1 + config.clip)
                losses.append(-torch.minimum(ratio_A * advantage_A, bound_A * advantage_A))
        return torch.cat(losses).mean()


def live_losses(data: PreferenceData, output: Path, objective: OpdConfig) -> list[float]:
    config = config_of(objective)
    args = training_arguments(config, OPTIONS, output)
    args.set_save(strategy="no")
    writer = wide_model(data.student)
    pairs = {pair.sample_id: pair for pair in make_pairs()}
    without_bound = replace_objective(config, objective)
    trainer = LiveTrainer(
        load_student(data.student, device=CPU),
        args,
        dataset=open_dataset(data.opd, split="train"),
        config=without_bound,
        teacher_head=None,
        on_event=None,
    )
    trainer.data_collator = lambda rows: {
        "rows": [responses_of(writer, pairs[row["sample_id"]]) for row in rows]
    }
    trainer.teacher, trainer.writer = LlamaForCausalLM.from_pretrained(data.teacher).eval(), writer
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Unwatched(OpdConfig):
    """Logs of the live trainer say nothing of staleness."""

    def check_logged(self, means: Any, step: int) -> None:
        pass


def replace_objective(config: TrainConfig, objective: OpdConfig) -> TrainConfig:
    return config.model_copy(update={"objective": Unwatched(**objective.model_dump())})


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.importance)
def test_the_loss_curve_from_the_cache_is_the_live_one(
    data: PreferenceData, tmp_path: Path, objective: OpdConfig
) -> None:
    result = run(data, tmp_path / "cached", objective, heldout=False)
    cached = [entry["loss"] for entry in result.history]
    live = live_losses(data, tmp_path / "live", objective)
    assert len(cached) == 8 and len({round(loss, 3) for loss in cached}) == 8
    assert cached == pytest.approx(live, rel=1e-5, abs=1e-6)


@torch.no_grad()
def drawn(model: Any, prompt_T: Any, length: int, generator: torch.Generator) -> list[int]:
    ids = [int(token) for token in prompt_T]
    for _ in range(length):
        probs_V = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
        ids.append(int(torch.multinomial(probs_V, 1, generator=generator)))
    return ids[len(prompt_T) :]


def write_drawn(data: PreferenceData, root: Path) -> tuple[list[Path], list[Responses]]:
    """Eight responses to each prompt, drawn from the student itself, with the teacher's scores."""
    student, teacher = wide_model(data.student), wide_model(data.teacher)
    generator = torch.Generator().manual_seed(11)
    rows, splits = [], {pair.sample_id: pair.split for pair in make_pairs()}
    for pair in make_pairs():
        said = [drawn(student, pair.prompt_ids_T, 6, generator) for _ in range(8)]
        own = [gathered(response_logprobs(student, pair.prompt_ids_T, one), one) for one in said]
        row = replace(
            responses_of(student, pair),
            response_ids_A=np.concatenate(said),
            response_lengths_N=np.full(8, 6, np.int32),
            finish_reasons_N=np.zeros(8, np.uint8),
            logprobs_A=torch.cat(own).detach().numpy(),
            top_ids_AK=np.tile(np.arange(K), (48, 1)),
            top_logprobs_AK=np.full((48, K), -9.0, np.float16),
        )
        rows.append(row)
    scores = [token_logprobs_of(teacher, row) for row in rows]
    bound = RESPONSES.bind(vocab_size=VOCAB_SIZE, sizes={"K": K})
    write_table(root / "own", bound, rows, data.teacher, splits=splits)
    of_tokens = RESPONSE_TOKEN_LOGPROBS.bind(vocab_size=VOCAB_SIZE)
    write_table(root / "scored", of_tokens, scores, data.teacher, splits=splits)
    return [root / "own", root / "scored"], rows


@torch.no_grad()
def numbers_of(student: Any, data: PreferenceData, rows: Sequence[Responses]) -> dict[str, float]:
    """Means over the tokens of some rows, each by its definition; ``kl`` over the vocabulary."""
    teacher, writer = wide_model(data.teacher), wide_model(data.student)
    found: dict[str, list[Tensor]] = {"kl": [], "reverse_kl": [], "staleness": []}
    for row in rows:
        for response in split_responses(row):
            own_AV, teacher_AV, writer_AV = (
                response_logprobs(model, row.prompt_ids_T, response)
                for model in (student, teacher, writer)
            )
            found["kl"].append((own_AV.exp() * (own_AV - teacher_AV)).sum(-1))
            own_A, teacher_A, writer_A = (
                gathered(each, response) for each in (own_AV, teacher_AV, writer_AV)
            )
            ratio_A = (own_A - writer_A).exp()
            found["reverse_kl"].append(ratio_A * (own_A - teacher_A))
            found["staleness"].append(ratio_A - 1 - (own_A - writer_A))
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["clipped", "none"])
def test_a_student_comes_nearer_to_the_teacher_and_says_how_far_it_has_gone(
    data: PreferenceData, tmp_path: Path, importance: Any
) -> None:
    """On its own draws, as it is meant; numbers against plain forwards, the KL over all tokens."""
    tables, rows = write_drawn(data, tmp_path)
    split_of = {pair.sample_id: pair.split for pair in make_pairs()}
    train_rows, held_out = (
        [row for row in rows if split_of[row.sample_id] == split] for split in ("train", "heldout")
    )
    objective = OpdConfig(importance=importance, max_staleness=1.0)
    settings = {"max_steps": 30, "lr": 3e-4}
    result = run(data, tmp_path / "out", objective, settings=settings, tables=tables)
    before, after = result.metrics["before"], result.metrics["after"]
    assert before["staleness"] == pytest.approx(0.0, abs=1e-9)
    first, last = result.history[0], result.history[-1]
    assert first["ratio"] == pytest.approx(1.0, abs=1e-5) and first["clipped"] == 0.0
    assert 0 < last["staleness"] < 1.0
    assert (last["clipped"] > 0) is (importance == "clipped")
    student = wide_model(result.output)
    untrained = numbers_of(wide_model(data.student), data, train_rows)
    trained = numbers_of(student, data, train_rows)
    assert trained["kl"] < untrained["kl"] - 0.015
    assert last["reverse_kl"] < trained["kl"] - 0.5  # of draws that were learnt from it says less
    expected, found = numbers_of(student, data, held_out), evaluate(result.output, tables)
    assert found["tokens"] == 4 * 48
    for name in ("reverse_kl", "staleness"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
        assert found[name] == pytest.approx(after[name], rel=1e-6)


@pytest.mark.slow
def test_early_stopping_goes_by_the_reverse_kl(data: PreferenceData, tmp_path: Path) -> None:
    stopping = EarlyStopping(patience=1, every=2)
    settings = {"max_steps": 4, "early_stopping": stopping}
    result = run(data, tmp_path / "out", OpdConfig(max_staleness=5.0), settings=settings)
    assert "best_reverse_kl" in result.metrics["train"]


def test_a_run_ends_where_the_responses_have_become_another_models(
    data: PreferenceData, tmp_path: Path
) -> None:
    """The student is the writer at step 1, and no more at step 2 or 3."""
    objective = OpdConfig(max_staleness=1e-4)
    with pytest.raises(ConfigError, match=r"at step [23] the student is .* more 'rounds'"):
        run(data, tmp_path / "out", objective, heldout=False)
    stranger = tmp_path / "other"
    with pytest.raises(ConfigError, match=r"at step 1 the student is .* nats a token from the one"):
        train(
            config_of(OpdConfig(max_staleness=1e-3)),
            student=data.reference,
            data=data.opd,
            output=stranger,
            options=OPTIONS,
            heldout=False,
        )


def test_scores_of_other_responses_are_refused(data: PreferenceData, tmp_path: Path) -> None:
    responses, scores = data.opd
    other = tmp_path / "scores"

    def fewer(row: Any) -> Any:
        count = int(row.response_num_tokens_N[0])
        return replace(
            row,
            token_logprobs_A=row.token_logprobs_A[:count],
            response_num_tokens_N=row.response_num_tokens_N[:1],
        )

    rows = open_dataset([scores], split="train")
    several = next(
        row["sample_id"]
        for row in (rows[index] for index in range(len(rows)))
        if len(row["response_num_tokens_N"]) > 1
    )
    write_changed(scores, other, several, fewer)
    settings = {"max_steps": 4, "per_device_batch_size": 12}
    with pytest.raises(StoreError, match=f"sample {several}: scores of responses of"):
        run(
            data,
            tmp_path / "a",
            OpdConfig(max_staleness=5.0),
            tables=[responses, other],
            settings=settings,
            heldout=False,
        )
    manifest = replace(read_manifest(other), identity={"inputs": ["another table"]})
    write_manifest(other, manifest)
    with pytest.raises(IdentityMismatch, match="scores other responses than those of"):
        run(data, tmp_path / "b", OpdConfig(), tables=[responses, other], heldout=False)
