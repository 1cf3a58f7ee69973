"""In-context Learning Distillation: one batch against dense float64, spans, deals of text.

Dimensions: N = candidates, P = scored positions of text, V = vocabulary.
"""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from schemas.dataset import open_dataset
from schemas.errors import StoreError
from stages.student.batches.episodes import EpisodesWithText, IclCollator
from stages.student.batches.signals import Collator
from stages.student.batches.step_rows import counts_of
from stages.student.losses.step import UNITS, Step, Term
from stages.student.objectives.icl_distillation import IclDistillationConfig
from tests.fixtures.cached_data import VOCAB_SIZE
from tests.fixtures.episode_data import (
    EpisodeData,
    answer_of,
    as_episode,
    candidates_of,
    make_episode_data,
    make_episodes,
    prompt_of,
    slow_logprob,
    successor_model,
    whole_logprobs,
)

F64 = torch.float64
PLAIN = IclDistillationConfig(lm_weight=0.0)
TUNING = IclDistillationConfig(lm_weight=0.0, alpha_start=1.0, alpha_end=1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EpisodeData:
    return make_episode_data(tmp_path_factory.mktemp("cache"), encodings=())


@pytest.fixture(scope="module")
def student(data: EpisodeData) -> Any:
    return LlamaForCausalLM.from_pretrained(data.student, dtype=F64)


def step_of(model: Any, progress: float, *, micro_batch_tokens: int = 60) -> Step:
    return Step(
        model=model,
        bare=model,
        dtype=F64,
        teacher_head=None,
        lm_teacher_head=None,
        micro_batch_tokens=micro_batch_tokens,
        progress=progress,
    )


def batch_of(data: EpisodeData) -> dict[str, Any]:
    """Episodes with candidates of one and of several tokens, and text."""
    texts = open_dataset(data.text.tables("threshold"), split="train")
    pairs = EpisodesWithText(open_dataset(data.icl, split="train"), texts, seed=3)
    return IclCollator(VOCAB_SIZE, Collator("threshold", VOCAB_SIZE))([pairs[i] for i in range(5)])


def loss_of(found: list[Term], batch: dict[str, Any]) -> Tensor:
    counts = dict(zip(UNITS, counts_of(batch), strict=True))
    return torch.stack([t.weight * t.total / counts[t.unit] for t in found]).sum()


def dense_icl(model: Any, episode: Any, teacher_N: Any, kind: str) -> tuple[Tensor, Tensor]:
    """Hard and soft loss of one episode from the definitions."""
    prompt, candidates = prompt_of(episode), candidates_of(episode)
    lengths_N = torch.tensor([len(c) for c in candidates], dtype=F64)
    own_N = torch.stack([slow_logprob(model, prompt, c) for c in candidates])
    theirs_N = torch.tensor(teacher_N, dtype=F64)
    if kind == "mean":
        own_N, theirs_N = own_N / lengths_N, theirs_N / lengths_N
    own_N = own_N.exp() / own_N.exp().sum()
    theirs_N = theirs_N.exp() / theirs_N.exp().sum()
    return -own_N[episode.gold].log(), -(theirs_N * own_N.log()).sum()


def dense_lm(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Hard and soft loss of the text, summed over positions."""
    lm = batch["lm"]
    teacher_PV = torch.zeros(len(lm["positions_N"]), VOCAB_SIZE, dtype=F64)
    teacher_PV.scatter_add_(1, lm["token_ids_NK"].long(), lm["weights_NK"].double())
    lengths = (lm["labels"] >= 0).sum(dim=1) + 1
    rows = [ids_T[:length] for ids_T, length in zip(lm["input_ids"], lengths, strict=True)]
    own_PV = torch.cat([whole_logprobs(model, ids_T) for ids_T in rows])
    next_P = torch.cat([ids_T[1:] for ids_T in rows])
    hard = torch.nn.functional.nll_loss(own_PV, next_P, reduction="sum")
    return hard, -(teacher_PV * own_PV).sum()


@pytest.mark.parametrize("kind", ["mean", "sum"])
@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_one_batch_matches_the_dense_loss(
    data: EpisodeData, student: Any, kind: Any, progress: float
) -> None:
    """Loss to 1e-5 (targets are float32), gradients to 1e-4 (so are a llama's norms)."""
    batch = batch_of(data)
    config = IclDistillationConfig(
        lm_weight=0.3, alpha_start=0.9, alpha_end=0.2, candidate_score=kind
    )
    found = config.terms(batch, step_of(student, progress))
    rows = open_dataset(data.icl, split="train")
    episodes = {episode.sample_id: episode for episode in make_episodes()}
    icl = [
        dense_icl(student, episodes[row["sample_id"]], row["candidate_logprobs_N"].tolist(), kind)
        for row in (rows[index] for index in range(5))
    ]
    hard_icl, soft_icl = (torch.stack(parts).mean() for parts in zip(*icl, strict=True))
    hard_lm, soft_lm = (part / len(batch["lm"]["positions_N"]) for part in dense_lm(student, batch))
    alpha = 0.9 + (0.2 - 0.9) * progress
    wanted = alpha * (hard_icl + 0.3 * hard_lm) + (1 - alpha) * (soft_icl + 0.3 * soft_lm)
    sums = {name: float(value) for term in found for name, value in term.sums.items()}
    assert sums["soft_icl"] / 5 == pytest.approx(soft_icl.item(), rel=1e-5)
    assert sums["hard_icl"] / 5 == pytest.approx(hard_icl.item(), rel=1e-5)
    positions = len(batch["lm"]["positions_N"])
    assert sums["soft_lm"] / positions == pytest.approx(soft_lm.item(), rel=1e-5)
    assert sums["kl_icl"] >= 0 and sums["kl_lm"] < sums["soft_lm"]
    assert sums["alpha"] / 5 == pytest.approx(alpha)
    assert_same_gradients(student, loss_of(found, batch), wanted)


def assert_same_gradients(model: Any, loss: Tensor, wanted: Tensor) -> None:
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (loss, wanted))
    for here, there in zip(ours, theirs, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def test_micro_batches_do_not_matter(data: EpisodeData, student: Any) -> None:
    batch = batch_of(data)
    student.train()
    whole, single = (
        loss_of(PLAIN.terms(batch, step_of(student, 0.5, micro_batch_tokens=tokens)), batch)
        for tokens in (100_000, 1)
    )
    assert_same_gradients(student, single, whole)


def test_generation_is_the_mean_over_the_answers_tokens(data: EpisodeData, student: Any) -> None:
    """No candidates, no soft part: a batch of both kinds, without a teacher."""
    dataset = open_dataset([data.root / "episodes"], split="train")
    pairs = EpisodesWithText(dataset, None, seed=0)
    rows = [dataset[index] for index in range(len(dataset))]
    chosen = [*[index for index, row in enumerate(rows) if row["gold"] < 0][:2], 0]
    batch = IclCollator(VOCAB_SIZE, None)([pairs[index] for index in chosen])
    found = TUNING.terms(batch, step_of(student, 0.7))
    episodes = {episode.sample_id: episode for episode in make_episodes()}
    first, second, last = (episodes[rows[index]["sample_id"]] for index in chosen)
    wanted = [
        -slow_logprob(student, prompt_of(episode), answer_of(episode)) / len(answer_of(episode))
        for episode in (first, second)
    ]
    scores = [0.0] * len(last.candidate_lengths_N)
    wanted.append(dense_icl(student, last, scores, "mean")[0])
    assert_same_gradients(student, loss_of(found, batch), torch.stack(wanted).mean())


def icl_row(ids: list[int], candidates: list[list[int]], gold: int) -> dict[str, Any]:
    episode = as_episode(ids, [], 0, candidates[gold], candidates, gold)
    names = ("sample_id", "input_ids_T", "answer_start", "candidate_ids_C", "candidate_lengths_N")
    columns = {name: getattr(episode, name) for name in names}
    lengths_N = episode.candidate_lengths_N
    scores = {
        "candidate_logprobs_N": np.zeros(len(candidates), np.float32),
        "candidate_num_tokens_N": lengths_N,
    }
    return columns | {"gold": gold} | scores


def test_a_free_answer_beside_a_teacher_has_a_hard_part_alone() -> None:
    """Its row of ``candidate_scores`` has one score, its answer's."""
    episode = as_episode([5, 6, 7], [], 0, [8, 9], [], -1)
    row = {
        "sample_id": episode.sample_id,
        "input_ids_T": episode.input_ids_T,
        "answer_start": episode.answer_start,
        "candidate_ids_C": episode.candidate_ids_C,
        "candidate_lengths_N": episode.candidate_lengths_N,
        "gold": -1,
        "candidate_logprobs_N": np.array([-3.0], np.float32),
        "candidate_num_tokens_N": np.array([2], np.int32),
    }
    chosen = icl_row([9, 30, 12], [[12], [13]], 1)
    batch = IclCollator(64, None)([(row, None), (chosen, None)])
    model = successor_model()
    config = PLAIN.model_copy(update={"alpha_start": 0.5, "alpha_end": 0.5})
    both = config.terms(batch, step_of(model, 0.0))[0].sums
    alone = config.terms(IclCollator(64, None)([(chosen, None)]), step_of(model, 0.0))[0].sums
    assert torch.equal(both["soft_icl"], alone["soft_icl"])
    assert float(both["hard_icl"] - alone["hard_icl"]) < 1e-2  # 8 and 9 do follow 7


def test_candidates_start_right_after_the_prompt() -> None:
    """A model that is sure of the successor chooses what counts up from the prompt's last token."""
    collate = IclCollator(64, None)
    rows = [
        icl_row([9, 30, 12], [[12], [13], [14], [31]], 1),
        icl_row([30, 12, 40], [[40, 41, 42], [41, 42], [42, 43], [13, 14]], 1),
        icl_row([12], [[13, 14, 16], [13, 14, 15], [13, 15, 14]], 1),
    ]
    batch = collate([(row, None) for row in rows])
    sums = PLAIN.terms(batch, step_of(successor_model(), 0.0))[0].sums
    assert float(sums["hard_icl"]) < 1e-3
    for gold in (0, 2):
        batch["gold"] = [gold] * 3
        sums = PLAIN.terms(batch, step_of(successor_model(), 0.0))[0].sums
        assert float(sums["hard_icl"]) > 3 * 5


def test_scores_of_other_candidates_are_refused() -> None:
    row = icl_row([5, 6], [[7], [8, 9]], 0) | {"candidate_num_tokens_N": np.array([1, 1])}
    with pytest.raises(StoreError, match=r"scores of candidates of \[1 1\] tokens.*have \[1 2\]"):
        IclCollator(64, None)([(row, None)])
    with pytest.raises(StoreError, match="candidate_ids_C holds id 9, the student has 9 tokens"):
        IclCollator(9, None)([(row, None)])


def test_texts_are_dealt_evenly(data: EpisodeData) -> None:
    episodes = open_dataset([data.root / "episodes"], split="train")
    texts = open_dataset([data.text.documents], split="heldout")
    pairs = EpisodesWithText(episodes, texts, seed=1)
    dealt = [text["sample_id"] for _, text in (pairs[i] for i in range(len(pairs))) if text]
    counts = [dealt.count(texts[i]["sample_id"]) for i in range(len(texts))]
    assert len(texts) < len(episodes) and max(counts) - min(counts) <= 1
    copy = pickle.loads(pickle.dumps(pairs))  # as a loader's workers get it
    assert [copy[i][1]["sample_id"] for i in range(len(copy))] == dealt
