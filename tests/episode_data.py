"""Few-shot episodes with a tiny teacher's signals, for the tests of the in-context objectives.

Scores of subsets and candidates come from one plain forward a token, in float64: slow, and sharing
nothing with the code under test.

Dimensions: T = tokens of a row, M = demonstrations, N = candidates or subsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.sample_id import sample_id_of
from schemas.tables.candidate_scores import CANDIDATE_SCORES, CandidateScores
from schemas.tables.episodes import EPISODES, Episode
from schemas.tables.subset_preferences import SUBSET_PREFERENCES, SubsetPreferences
from schemas.tables.teacher_logits import ENCODINGS
from tests.cached_data import VOCAB_SIZE, CachedData, make_cached_data, write_signals, write_table

NUM_SUBSETS = 4
SEPARATOR, END = 5, 6
Ids = Any  # numpy [T] or a list


@dataclass(frozen=True)
class EpisodeData:
    """Tables of episodes and their signals, and beside them ``text``: documents and theirs."""

    root: Path
    text: CachedData

    @property
    def student(self) -> Path:
        return self.text.student

    def bialign(self, encoding: str) -> list[Path]:
        return [self.root / name for name in ("episodes", encoding, "preferences")]

    @property
    def icl(self) -> list[Path]:
        return [self.root / "episodes", self.root / "candidates"]


def make_episode_data(root: Path, encodings: Sequence[str] = tuple(ENCODINGS)) -> EpisodeData:
    """Write teacher, student, text, episodes and every signal of theirs."""
    data = EpisodeData(root, make_cached_data(root / "text"))
    episodes = make_episodes()
    bound = EPISODES.bind(vocab_size=VOCAB_SIZE)
    write_table(root / "episodes", bound, episodes, data.text.teacher)
    here = CachedData(root, data.text.teacher, data.text.student)
    for encoding in encodings:
        write_signals(here, encoding, episodes)
    model = LlamaForCausalLM.from_pretrained(data.text.teacher, dtype=torch.float64).eval()
    splits = {episode.sample_id: episode.split for episode in episodes}
    preferences = [preferences_of(model, episode) for episode in episodes]
    scores = [scores_of(model, episode) for episode in episodes if episode.gold >= 0]
    for name, table, rows in (
        ("preferences", SUBSET_PREFERENCES, preferences),
        ("candidates", CANDIDATE_SCORES, scores),
    ):
        bound_table: Any = table.bind(vocab_size=VOCAB_SIZE)
        write_table(root / name, bound_table, rows[::-1], data.text.teacher, splits=splits)
    return data


def make_episodes() -> list[Episode]:
    """Three to five demonstrations; candidates of one token, of several, or none at all."""
    rng = np.random.default_rng(11)
    train = ("single", "several", "none", "several") * 4
    made = [make_episode(rng, kind, split="train") for kind in train]
    return made + [make_episode(rng, kind, split="heldout") for kind in train[:3]]


def make_episode(rng: np.random.Generator, kind: str, *, split: str) -> Episode:
    def tokens(low: int, high: int) -> list[int]:
        ids: list[int] = rng.integers(10, VOCAB_SIZE, rng.integers(low, high + 1)).tolist()
        return ids

    longest = 1 if kind == "single" else 3
    candidates = [tokens(1, longest) for _ in range(4)] if kind != "none" else []
    if kind == "several":
        candidates[1] = candidates[0] + [7]  # one that begins another
    gold = int(rng.integers(4)) if candidates else -1
    answer = candidates[gold] if candidates else tokens(2, 3)
    ids, spans = [0], []
    for _ in range(int(rng.integers(3, 6))):
        start, shown = len(ids), tokens(2, 4)
        demonstrated = candidates[int(rng.integers(4))] if candidates else tokens(1, 2)
        ids += [*shown, SEPARATOR, *demonstrated, END]
        answer_start = start + len(shown) + 1
        spans.append((start, answer_start, answer_start + len(demonstrated)))
    query_start = len(ids)
    ids += [*tokens(2, 5), SEPARATOR]
    return as_episode(ids, spans, query_start, answer, candidates, gold, split=split)


def as_episode(
    ids: list[int],
    spans: Sequence[tuple[int, int, int]],
    query_start: int,
    answer: list[int],
    candidates: Sequence[list[int]],
    gold: int,
    *,
    split: str = "train",
) -> Episode:
    """Put an episode together; ``ids`` ends with the query."""
    return Episode(
        sample_id=sample_id_of(np.array([*ids, *answer])),
        split=split,
        task="made up",
        kind="classification" if candidates else "generation",
        query_id="q",
        draw=0,
        input_ids_T=np.array([*ids, *answer]),
        demonstrations_M3=np.array(spans, np.int32).reshape(-1, 3),
        query_start=query_start,
        answer_start=len(ids),
        candidate_ids_C=np.array([token for ids in candidates for token in ids], np.int64),
        candidate_lengths_N=np.array([len(ids) for ids in candidates], np.int32),
        gold=gold,
    )


def preferences_of(model: Any, episode: Episode) -> SubsetPreferences:
    """Draw distinct subsets (the empty one too, now and then) and rank them."""
    rng = np.random.default_rng(int(episode.sample_id[:8], 16))
    num_demos, answer = len(episode.demonstrations_M3), answer_of(episode)
    chosen = rng.permutation(2**num_demos)[:NUM_SUBSETS]
    subsets = [[m for m in range(num_demos) if code >> m & 1] for code in chosen.tolist()]
    with torch.no_grad():
        scores = [slow_logprob(model, subset_prompt(episode, s), answer).item() for s in subsets]
    return SubsetPreferences(
        sample_id=episode.sample_id,
        subset_demonstrations_S=np.array([m for subset in subsets for m in subset], np.int32),
        subset_sizes_N=np.array([len(subset) for subset in subsets], np.int32),
        answer_logprobs_N=np.array(scores, np.float32),
        num_answer_tokens=len(answer),
        ranks_N=np.array([1 + sum(q > mine for q in scores) for mine in scores], np.int32),
    )


def scores_of(model: Any, episode: Episode) -> CandidateScores:
    """Score every candidate after the prompt."""
    prompt, candidates = prompt_of(episode), candidates_of(episode)
    with torch.no_grad():
        scores = [slow_logprob(model, prompt, candidate).item() for candidate in candidates]
    return CandidateScores(
        sample_id=episode.sample_id,
        candidate_logprobs_N=np.array(scores, np.float32),
        candidate_num_tokens_N=np.array([len(c) for c in candidates], np.int32),
    )


def prompt_of(episode: Any) -> list[int]:
    ids: list[int] = episode.input_ids_T.tolist()
    return ids[: episode.answer_start]


def answer_of(episode: Any) -> list[int]:
    ids: list[int] = episode.input_ids_T.tolist()
    return ids[episode.answer_start :]


def candidates_of(episode: Any) -> list[list[int]]:
    left = episode.candidate_ids_C.tolist()
    return [[left.pop(0) for _ in range(length)] for length in episode.candidate_lengths_N]


def subset_prompt(episode: Any, kept: Sequence[int]) -> list[int]:
    """The prompt with some demonstrations, token by token: keep what no other one covers."""
    spans = episode.demonstrations_M3.tolist()
    ends = [start for start, _, _ in spans[1:]] + [episode.query_start]
    dropped = {
        t
        for m, ((start, _, _), end) in enumerate(zip(spans, ends, strict=True))
        if m not in kept
        for t in range(start, end)
    }
    return [token for t, token in enumerate(prompt_of(episode)) if t not in dropped]


def slow_logprob(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Sum of log p, one forward a token: the logits after the last token are all that is read."""
    total, ids = torch.zeros((), dtype=torch.float64), list(prompt)
    for token in answer:
        logits_V = model(input_ids=torch.tensor([ids])).logits[0, -1]
        total = total + logits_V.double().log_softmax(-1)[token]
        ids.append(token)
    return total


def whole_logprobs(model: Any, ids_T: Ids) -> Tensor:
    """[T - 1, V] log-probs of one sequence: row t - 1 predicts token t."""
    input_ids = torch.as_tensor(np.asarray(ids_T, np.int64))[None]
    logits_TV: Tensor = model(input_ids=input_ids).logits[0, :-1]
    return logits_TV.double().log_softmax(-1)


def successor_model() -> Any:
    """A llama whose logits after token v put all mass on v + 1, whatever came before."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(64))
        model.lm_head.weight.copy_(20 * torch.eye(64).roll(1, dims=0))
    return model
