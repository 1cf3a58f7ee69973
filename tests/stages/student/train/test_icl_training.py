"""ICL-D runs: the schedule, learning, accumulation, resume, and what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.errors import ConfigError
from schemas.storage.manifest import read_manifest, write_manifest
from schemas.storage.shards import read_shard, write_shard
from schemas.tables.teacher_logits import TOP_K, TopKLogits
from stages.student.objectives.icl_distillation import IclDistillationConfig
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig, TrainStage
from stages.student.train.work import TrainResult, train
from tests.fixtures.cached_data import K
from tests.fixtures.episode_data import EpisodeData, make_episode_data

OPTIONS = TrainOptions(num_workers=0, log_every=1, checkpoint_every=3, micro_batch_tokens=400)
WITH_TEXT = IclDistillationConfig()
CONFIG = TrainConfig(max_steps=6, lr=3e-3, per_device_batch_size=4, objective=WITH_TEXT)
PLAIN = IclDistillationConfig(lm_weight=0.0)
TUNING = IclDistillationConfig(lm_weight=0.0, alpha_start=1.0, alpha_end=1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EpisodeData:
    return make_episode_data(tmp_path_factory.mktemp("cache"), encodings=())


def run(
    cache: EpisodeData, output: Path, objective: IclDistillationConfig, **more: Any
) -> TrainResult:
    settings = more.pop("settings", {}) | {"objective": objective}
    data = more.pop("data", cache.icl)
    if objective.lm_weight and "lm_data" not in more:
        more["lm_data"] = cache.text.tables("top_k")
    return train(
        CONFIG.model_copy(update=settings),
        student=cache.student,
        data=data,
        output=output,
        options=OPTIONS,
        **({"heldout": False} | more),
    )


def losses(result: TrainResult) -> list[float]:
    return [entry["loss"] for entry in result.history]


def test_alpha_goes_from_start_to_end_in_a_line(data: EpisodeData, tmp_path: Path) -> None:
    objective = IclDistillationConfig(alpha_start=0.75, alpha_end=0.25)
    result = run(data, tmp_path / "out", objective)
    found = [entry["alpha"] for entry in result.history]
    assert found == pytest.approx(np.linspace(0.75, 0.25, 6).tolist())
    for entry in result.history:
        soft = entry["soft_icl"] + 0.2 * entry["soft_lm"]
        hard = entry["hard_icl"] + 0.2 * entry["hard_lm"]
        expected = entry["alpha"] * hard + (1 - entry["alpha"]) * soft
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)
    assert result.metrics["train"]["samples"] == 24.0
    assert result.metrics["train"]["rows_without_partner"] == 4.0  # generation: no candidates


def test_one_step_has_the_first_alpha(data: EpisodeData, tmp_path: Path) -> None:
    result = run(data, tmp_path / "out", PLAIN, settings={"max_steps": 1})
    assert result.history[0]["alpha"] == 1.0


def test_the_student_learns_the_teachers_choices(data: EpisodeData, tmp_path: Path) -> None:
    objective = IclDistillationConfig(lm_weight=0.0, alpha_start=0.0)
    found = run(data, tmp_path / "out", objective, settings={"max_steps": 16}).history
    divergence = [entry["kl_icl"] for entry in found]
    assert sum(divergence[-4:]) < 0.7 * sum(divergence[:4])


@pytest.mark.slow
def test_in_context_tuning_needs_no_teacher_table(data: EpisodeData, tmp_path: Path) -> None:
    result = run(data, tmp_path / "out", TUNING, data=[data.root / "episodes"], heldout=True)
    assert result.metrics["after"]["cross_entropy"] < result.metrics["before"]["cross_entropy"]
    assert "soft_icl" not in result.history[0]
    assert losses(result)[-1] < losses(result)[0]
    text = TUNING.model_copy(update={"lm_weight": 0.5})
    more = {"data": [data.root / "episodes"], "lm_data": [data.text.documents]}
    both = run(data, tmp_path / "both", text, **more)
    first = both.history[0]
    assert first["loss"] == pytest.approx(first["hard_icl"] + 0.5 * first["hard_lm"], rel=1e-5)


@pytest.mark.parametrize("objective", [PLAIN, IclDistillationConfig()])
@pytest.mark.slow
def test_accumulated_batches_are_one_batch(
    data: EpisodeData, tmp_path: Path, objective: IclDistillationConfig
) -> None:
    """Texts of 2 to 24 tokens, episodes of their own count: each divided by its own."""
    short = {"max_steps": 3}
    split = short | {"per_device_batch_size": 1, "gradient_accumulation_steps": 4}
    whole = run(data, tmp_path / "a", objective, settings=short)
    parts = run(data, tmp_path / "b", objective, settings=split)
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-5)


@pytest.mark.slow
def test_bfloat16_stays_near_float32(data: EpisodeData, tmp_path: Path) -> None:
    wide = run(data, tmp_path / "wide", IclDistillationConfig())
    narrow = run(data, tmp_path / "narrow", IclDistillationConfig(), settings={"dtype": "bfloat16"})
    assert losses(narrow) != losses(wide)
    assert losses(narrow) == pytest.approx(losses(wide), rel=0.03)


class Stopped(Exception):
    """What a test throws from ``on_event`` to stop a run."""


def stop_at_four(event: dict[str, Any]) -> None:
    if event["event"] == "step" and event["step"] == 4:
        raise Stopped


@pytest.mark.slow
def test_a_stopped_run_resumes_with_the_same_losses(data: EpisodeData, tmp_path: Path) -> None:
    """Alpha and the deal of texts too go on where they were."""
    whole = run(data, tmp_path / "whole", IclDistillationConfig())
    with pytest.raises(Stopped):
        run(data, tmp_path / "out", IclDistillationConfig(), on_event=stop_at_four)
    resumed = run(data, tmp_path / "out", IclDistillationConfig())
    assert losses(resumed) == losses(whole)


def test_other_texts_are_another_run(data: EpisodeData, tmp_path: Path) -> None:
    objective = IclDistillationConfig(lm_weight=0.1)
    first = run(data, tmp_path / "out", objective, settings={"max_steps": 1})
    with pytest.raises(ConfigError, match=r"holds training .* choose another output folder"):
        other = data.text.tables("threshold")
        run(data, tmp_path / "out", objective, settings={"max_steps": 1}, lm_data=other)
    again = run(data, tmp_path / "out", objective, settings={"max_steps": 1})
    assert again.fingerprint == first.fingerprint


def test_text_of_imported_distributions_is_refused(data: EpisodeData, tmp_path: Path) -> None:
    """Nobody knows their entropies, which the loss adds: it would be no number."""

    def without_entropies(row: TopKLogits) -> TopKLogits:
        return replace(row, entropies_P=np.full_like(row.entropies_P, np.nan))

    shutil.copytree(data.text.root, tmp_path / "text")
    folder = tmp_path / "text" / "top_k"
    manifest = read_manifest(folder)
    bound = TOP_K.bind(vocab_size=manifest.vocab_size, sizes={"K": K})
    shards = []
    for shard in manifest.shards:
        batches = read_shard(folder / shard.file).to_batches()
        rows = [without_entropies(row) for batch in batches for row in TOP_K.rows(batch)]
        written = write_shard(folder / shard.file, bound, rows)
        shards.append(replace(shard, sha256=written.sha256, num_bytes=written.num_bytes))
    write_manifest(folder, replace(manifest, shards=tuple(shards)))
    with pytest.raises(ConfigError, match="whose entropies nobody knows"):
        run(data, tmp_path / "out", WITH_TEXT, lm_data=[data.text.documents, folder])


def test_missing_tables_are_named(data: EpisodeData, tmp_path: Path) -> None:
    objective, text = IclDistillationConfig(), data.text
    for more, message in (
        ({"data": [data.root / "episodes"]}, "needs a candidate_scores table, the data has: epi"),
        ({"data": text.tables("top_k")}, "needs an episodes table, the data has: documents, teach"),
        ({"lm_data": [text.documents]}, "needs a teacher_logits table, the lm_data has: documents"),
        ({"lm_data": []}, r"lm_weight > 0 needs 'lm_data' .* got none: name it, or set lm_weight"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(data, tmp_path / "out", objective, **more)
    with pytest.raises(ConfigError, match="2 tables that objective 'icl_distillation' would not"):
        run(data, tmp_path / "out", PLAIN, lm_data=text.tables("top_k"))


@pytest.mark.parametrize(
    ("objective", "lm_data", "message"),
    [
        ({"loss": "icl_distillation"}, [], "lm_weight > 0 needs 'lm_data'"),
        ({"loss": "icl_distillation", "lm_weight": 0.0}, ["text"], "'lm_data' has 1 tables"),
        ({"loss": "kd"}, ["text"], "'lm_data' has 1 tables that objective 'kd' would not read"),
    ],
)
def test_a_recipe_names_text_where_it_is_read(
    objective: dict[str, Any], lm_data: list[str], message: str
) -> None:
    body = {"stage": "train", "student": "s", "data": ["d"], "max_steps": 1}
    with pytest.raises(ValueError, match=message):
        TrainStage.model_validate({**body, "objective": objective, "lm_data": lm_data})
