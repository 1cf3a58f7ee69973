"""BiAlign: one batch against dense float64, spans of subsets, accumulation, resume, refusals.

Dimensions: N = subsets, P = scored positions, V = vocabulary.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from schemas.dataset import open_dataset
from schemas.errors import ConfigError, StoreError
from stages.models.causal_lm.language_head import LanguageHead
from stages.student.batches.episodes import BiAlignCollator, subsets_of
from stages.student.batches.signals import Collator, encoding_of
from stages.student.losses.ranking import ranking_loss
from stages.student.losses.step import Step, Term
from stages.student.objectives.bialign import BiAlignConfig
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import TrainResult, train
from tests.fixtures.cached_data import VOCAB_SIZE
from tests.fixtures.episode_data import (
    EpisodeData,
    as_episode,
    make_episode_data,
    make_episodes,
    slow_logprob,
    subset_prompt,
    whole_logprobs,
)

F64 = torch.float64
OPTIONS = TrainOptions(num_workers=0, log_every=1, checkpoint_every=3, micro_batch_tokens=400)
CONFIG = TrainConfig(
    max_steps=6, lr=3e-3, per_device_batch_size=4, objective=BiAlignConfig(rank_weight=0.7)
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EpisodeData:
    return make_episode_data(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def student(data: EpisodeData) -> Any:
    return LlamaForCausalLM.from_pretrained(data.student, dtype=F64)


def step_of(model: Any, head: LanguageHead | None = None, *, micro_batch_tokens: int = 60) -> Step:
    return Step(
        model=model,
        bare=model,
        dtype=F64,
        teacher_head=head,
        lm_teacher_head=None,
        micro_batch_tokens=micro_batch_tokens,
        progress=0.0,
    )


def dense_teacher(batch: dict[str, Tensor], head: LanguageHead | None) -> Tensor:
    """[P, V] probabilities of what a batch holds (``top_k`` has a bucket, so no such thing)."""
    if "hidden_ND" in batch:
        assert head is not None
        return head.logits(batch["hidden_ND"]).double().softmax(-1)
    probs_PV = torch.zeros(len(batch["positions_N"]), VOCAB_SIZE, dtype=F64)
    return probs_PV.scatter_add_(1, batch["token_ids_NK"].long(), batch["weights_NK"].double())


@pytest.mark.parametrize("encoding", ["threshold", "threshold_tau", "exact"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_batch_matches_the_dense_loss(
    data: EpisodeData, student: Any, encoding: str, reduction: Any
) -> None:
    """Loss to 1e-5 (targets are float32), gradients to 1e-4 (so are a llama's norms)."""
    dataset = open_dataset(data.bialign(encoding), split="train")
    rows = [dataset[index] for index in (0, 1, 4)]
    batch = BiAlignCollator(Collator(encoding_of(dataset), VOCAB_SIZE))(rows)
    head = None
    if encoding == "exact":
        head = LanguageHead.load(data.root / "exact", device="cpu")
    config = BiAlignConfig(rank_weight=0.7, kl_reduction=reduction)
    found = {"tokens": len(batch["positions_N"]), "samples": 3}
    kl, rank = config.terms(batch, step_of(student, head))
    loss = sum(term.weight * term.total / found[term.unit] for term in (kl, rank))

    episodes = {episode.sample_id: episode for episode in make_episodes()}
    chosen = [episodes[row["sample_id"]] for row in rows]
    own_PV = torch.cat([whole_logprobs(student, episode.input_ids_T) for episode in chosen])
    teacher_PV = dense_teacher(batch, head)
    entropy = batch["entropies_N"].double().sum()
    kl_sum = -(teacher_PV * own_PV).sum() - entropy
    ranking = []
    for row, episode in zip(rows, chosen, strict=True):
        left, answer = row["subset_demonstrations_S"].tolist(), episode.input_ids_T.tolist()
        subsets = [[left.pop(0) for _ in range(size)] for size in row["subset_sizes_N"]]
        answer = answer[episode.answer_start :]
        scores = [slow_logprob(student, subset_prompt(episode, s), answer) for s in subsets]
        ranking.append(
            ranking_loss(torch.stack(scores), torch.tensor(row["ranks_N"]), detach_range=True)
        )
    rank_sum = torch.stack(ranking).sum()
    wanted = kl_sum / (len(own_PV) if reduction == "mean" else 3) + 0.7 * rank_sum / 3
    assert float(kl.sums["kl"]) == pytest.approx(kl_sum.item(), rel=1e-5)
    assert float(rank.sums["rank"]) == pytest.approx(rank_sum.item(), rel=1e-9)
    assert_same_gradients(student, loss, wanted)


def assert_same_gradients(model: Any, loss: Any, wanted: Tensor) -> None:
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (loss, wanted))
    for here, there in zip(ours, theirs, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def test_micro_batches_do_not_matter(data: EpisodeData, student: Any) -> None:
    dataset = open_dataset(data.bialign("top_k"), split="train")
    batch = BiAlignCollator(Collator("top_k", VOCAB_SIZE))([dataset[i] for i in range(4)])
    student.train()

    def rank_term(micro_batch_tokens: int) -> Term:
        step = step_of(student, micro_batch_tokens=micro_batch_tokens)
        return BiAlignConfig().terms(batch, step)[1]

    whole, single = rank_term(100_000).total, rank_term(1).total
    assert_same_gradients(student, single, whole)


def test_a_subset_is_its_demonstrations_the_query_and_the_answer() -> None:
    """Every token tells its place: 100 + 10 m of demonstration m, 40 of the query, 50 answers."""
    ids = [0, 100, 101, 102, 110, 111, 120, 121, 122, 123, 40, 41]
    spans = [(1, 2, 3), (4, 4, 5), (6, 7, 9)]
    episode = as_episode(ids, spans, 10, [50, 51], [[50, 51], [60]], 0)
    columns = {name: getattr(episode, name) for name in EPISODE_COLUMNS}
    row = columns | {
        "subset_demonstrations_S": np.array([2, 0, 0, 1, 2]),
        "subset_sizes_N": np.array([2, 0, 1, 2]),
        "num_answer_tokens": 2,
    }
    subsets = subsets_of(row)
    assert [subset.prompt_T.tolist() for subset in subsets] == [
        [0, 120, 121, 122, 123, 100, 101, 102, 40, 41],
        [0, 40, 41],
        [0, 100, 101, 102, 40, 41],
        [0, 110, 111, 120, 121, 122, 123, 40, 41],
    ]
    assert all(subset.token_ids_C.tolist() == [50, 51] for subset in subsets)
    for wrong in ({"num_answer_tokens": 3}, {"subset_demonstrations_S": np.array([2, 0, 0, 1, 3])}):
        with pytest.raises(StoreError, match=f"sample {episode.sample_id}: preferences of subsets"):
            subsets_of(row | wrong)


EPISODE_COLUMNS = ("sample_id", "input_ids_T", "demonstrations_M3", "query_start", "answer_start")


def run(
    cache: EpisodeData,
    output: Path,
    config: TrainConfig = CONFIG,
    data: list[Path] | None = None,
    **more: Any,
) -> TrainResult:
    tables = data or cache.bialign("threshold")
    return train(config, student=cache.student, data=tables, output=output, options=OPTIONS, **more)


def losses(result: TrainResult) -> list[float]:
    return [entry["loss"] for entry in result.history]


def test_the_student_learns_the_teachers_order(data: EpisodeData, tmp_path: Path) -> None:
    result = run(data, tmp_path / "out", CONFIG.model_copy(update={"max_steps": 16}))
    ranks = [entry["rank"] for entry in result.history]
    assert sum(ranks[-4:]) < 0.8 * sum(ranks[:4])
    assert result.metrics["after"]["kl_to_teacher"] < result.metrics["before"]["kl_to_teacher"]
    first = result.history[0]
    assert first["loss"] == pytest.approx(first["kl"] + 0.7 * first["rank"], rel=1e-5)
    assert first["num_samples"] == 4


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.slow
def test_accumulated_batches_are_one_batch(
    data: EpisodeData, tmp_path: Path, reduction: Any
) -> None:
    """Episodes of unlike lengths: a mean of batch means would be elsewhere."""
    objective = BiAlignConfig(kl_reduction=reduction)
    short = {"objective": objective, "max_steps": 3}
    split = short | {"per_device_batch_size": 1, "gradient_accumulation_steps": 4}
    whole = run(data, tmp_path / "a", CONFIG.model_copy(update=short), heldout=False)
    parts = run(data, tmp_path / "b", CONFIG.model_copy(update=split), heldout=False)
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-5)


class Stopped(Exception):
    """What a test throws from ``on_event`` to stop a run."""


def stop_at_four(event: dict[str, Any]) -> None:
    if event["event"] == "step" and event["step"] == 4:
        raise Stopped


@pytest.mark.slow
def test_a_stopped_run_resumes_with_the_same_losses(data: EpisodeData, tmp_path: Path) -> None:
    whole = run(data, tmp_path / "whole", heldout=False)
    with pytest.raises(Stopped):
        run(data, tmp_path / "out", heldout=False, on_event=stop_at_four)
    assert losses(run(data, tmp_path / "out", heldout=False)) == losses(whole)


def test_missing_tables_are_named(data: EpisodeData, tmp_path: Path) -> None:
    episodes, signals, preferences = data.bialign("threshold")
    for tables, missing in (
        ([episodes, signals], "a subset_preferences"),
        ([episodes, preferences], "a teacher_logits"),
        (data.text.tables("threshold"), "an episodes"),
    ):
        with pytest.raises(ConfigError, match=f"'bialign' needs {missing} table, the data has: "):
            run(data, tmp_path / "out", data=tables)
    with pytest.raises(ConfigError, match="'lm_data' has 1 tables that objective 'bialign' would"):
        run(data, tmp_path / "out", lm_data=[data.text.documents])


def test_ids_beyond_the_vocabulary_are_refused(data: EpisodeData) -> None:
    dataset = open_dataset(data.bialign("threshold"), split="train")
    collate = BiAlignCollator(replace(Collator("threshold", VOCAB_SIZE), vocab_size=200))
    with pytest.raises(StoreError, match=r"input_ids_T holds id \d+, the student has 200 tokens"):
        collate([dataset[index] for index in range(4)])
