"""Real text as few-shot episodes of four tasks, tables about them, and slow scores to hold against.

Dimensions: N = candidates or subsets, T = tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from schemas.sample_id import sample_id_of
from schemas.tables.candidate_scores import CANDIDATE_SCORES, CandidateScores
from schemas.tables.episodes import EPISODES, Episode
from schemas.tables.subset_preferences import SUBSET_PREFERENCES, SubsetPreferences
from schemas.tables.teacher_logits import TOP_K, TopKLogits
from stages.models.checkpoints.tokenizer_identity import copy_tokenizer
from stages.signals.scoring.encoding import measure, top_k
from tests.cached_data import write_table
from tests.tiny_episodes import PlainModel

VOCAB_SIZE, NUM_DEMONSTRATIONS = 512, 3
SUBSETS = ([0, 1], [2], [0, 2], [0, 1, 2])
KINDS = (" object", " class", " string", " false")  # of 1, 1, 3 and 3 tokens
WORDS = (
    *(" the", " of", " object", " class", " value", " function"),
    *(" name", " is", " to", " in", " and", " string"),
)


@dataclass(frozen=True)
class Parts:
    """An episode's token ids before they were put together."""

    demonstrations: list[list[int]]
    query: list[int]
    answer: list[int]
    candidates: list[list[int]]

    def prompt(self, kept: Sequence[int] = range(NUM_DEMONSTRATIONS)) -> list[int]:
        return [i for m in kept for i in self.demonstrations[m]] + self.query


@dataclass(frozen=True)
class Slow:
    """A model's scores of whole episodes, each made once, from parts and not from spans."""

    model: PlainModel
    parts: dict[str, Parts]
    found: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def candidates(self, episode: Episode) -> list[float]:
        """Sums of log p of each candidate's tokens."""
        parts, key = self.parts[episode.sample_id], ("candidates", episode.sample_id)
        if key not in self.found:
            prompt = parts.prompt()
            self.found[key] = [self.model.logprob(prompt, ids) for ids in parts.candidates]
        return self.found[key]

    def subsets(self, episode: Episode) -> list[float]:
        """Log Q of the answer under each of ``SUBSETS``."""
        parts, key = self.parts[episode.sample_id], ("subsets", episode.sample_id)
        if key not in self.found:
            prompts = [parts.prompt(kept) for kept in SUBSETS]
            self.found[key] = [self.model.logprob(prompt, parts.answer) for prompt in prompts]
        return self.found[key]


@dataclass(frozen=True)
class Made:
    """Tables about episodes, the folders of the models, and what the episodes came from."""

    root: Path
    teacher: Path
    student: Path
    episodes: list[Episode]
    parts: dict[str, Parts]
    slow: dict[Path, Slow]

    def tables(self, *names: str) -> list[Path]:
        return [self.root / name for name in ("episodes", *names)]

    def of(self, task: str) -> list[Episode]:
        return [episode for episode in self.episodes if episode.task == task]


def make_all(root: Path, teacher: Path) -> Made:
    """Write episodes and what the teacher says of them."""
    student = save_student(root / "student", teacher)
    found = make_episodes(AutoTokenizer.from_pretrained(teacher))
    episodes = [episode for episode, _ in found]
    parts = {episode.sample_id: part for episode, part in found}
    slow = {folder: Slow(PlainModel(folder), parts) for folder in (teacher, student)}
    says = slow[teacher]
    chosen = [episode for episode in episodes if episode.gold >= 0]
    splits = {episode.sample_id: "heldout" for episode in episodes}
    tables: list[tuple[Any, list[Any], dict[str, int]]] = [
        (EPISODES, episodes, {}),
        (CANDIDATE_SCORES, [_candidates(says, episode) for episode in chosen], {}),
        (SUBSET_PREFERENCES, [_subsets(says, episode) for episode in episodes], {}),
        (TOP_K, [_top_k(says.model, episode) for episode in episodes], {"K": 8}),
    ]
    for table, rows, sizes in tables:
        bound = table.bind(vocab_size=VOCAB_SIZE, sizes=sizes)
        write_table(root / table.name, bound, rows, teacher, splits=splits)
    return Made(root, teacher, student, episodes, parts, slow)


def save_student(folder: Path, teacher: Path) -> Path:
    torch.manual_seed(5)
    config = LlamaConfig.from_pretrained(teacher, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    copy_tokenizer(teacher, folder)
    return folder


def make_episodes(tokenizer: Any) -> list[tuple[Episode, Parts]]:
    """Three tasks of choice and a free one; demonstrations of mixed lengths."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    def made(task: str, kind: str, query: int, draw: int, names: Sequence[str]) -> Any:
        numbers = np.random.default_rng((len(task), query, draw)).integers(0, 12, (3, 4)).tolist()
        answers = [WORDS[row[0]] for row in numbers]
        texts = ["".join(WORDS[i] for i in row[1 : 2 + row[0] % 3]) + "\n" for row in numbers]
        names = names[::-1] if task == "own" and draw else names
        gold = -1 if kind == "generation" else names.index(sorted(names)[query % len(names)])
        parts = Parts(
            [encode(t) + encode(a) + encode("\n\n") for t, a in zip(texts, answers, strict=True)],
            encode("".join(WORDS[: query + 2]) + "\n"),
            encode(WORDS[query]) if gold < 0 else encode(names[gold]),
            [encode(name) for name in names],
        )
        tails = [len(encode(a)) for a in answers]
        return episode_of(parts, task, kind, f"{task} {query}", draw, gold, tails), parts

    def own(query: int) -> Sequence[str]:
        return WORDS[query : query + 3]

    return [
        *(made("kinds", "classification", q, d, KINDS) for d in range(3) for q in range(5)),
        *(made("own", "multiple_choice", q, d, own(q)) for d in range(2) for q in range(4)),
        *(made("many", "classification", q, 0, WORDS) for q in range(6)),
        *(made("free", "generation", q, d, ()) for d in range(2) for q in range(4)),
    ]


def episode_of(
    parts: Parts, task: str, kind: str, query_id: str, draw: int, gold: int, tails: list[int]
) -> Episode:
    """Put the parts together; each demonstration ends in its answer and two line ends."""
    ids_T = np.array(parts.prompt() + parts.answer)
    lengths = [len(ids) for ids in parts.demonstrations]
    starts = np.cumsum([0, *lengths])
    num_separators = 2
    ends = starts[1:] - num_separators
    spans = np.stack([starts[:-1], ends - np.array(tails), ends], axis=1)
    prompt = len(ids_T) - len(parts.answer)
    return Episode(
        sample_id=sample_id_of(ids_T, [(prompt, draw), (len(task), gold)]),
        split="heldout",
        task=task,
        kind=kind,
        query_id=query_id,
        draw=draw,
        input_ids_T=ids_T,
        demonstrations_M3=spans,
        query_start=int(starts[-1]),
        answer_start=prompt,
        candidate_ids_C=np.array([i for ids in parts.candidates for i in ids], np.int64),
        candidate_lengths_N=np.array([len(ids) for ids in parts.candidates], np.int64),
        gold=gold,
    )


def _candidates(teacher: Slow, episode: Episode) -> CandidateScores:
    return CandidateScores(
        sample_id=episode.sample_id,
        candidate_logprobs_N=np.array(teacher.candidates(episode)),
        candidate_num_tokens_N=episode.candidate_lengths_N,
    )


def _subsets(teacher: Slow, episode: Episode) -> SubsetPreferences:
    scores = teacher.subsets(episode)
    return SubsetPreferences(
        sample_id=episode.sample_id,
        subset_demonstrations_S=np.concatenate(SUBSETS),
        subset_sizes_N=np.array([len(kept) for kept in SUBSETS]),
        answer_logprobs_N=np.array(scores),
        num_answer_tokens=len(teacher.parts[episode.sample_id].answer),
        ranks_N=np.array([1 + sum(other > own for other in scores) for own in scores]),
    )


@torch.no_grad()
def _top_k(teacher: PlainModel, episode: Episode) -> TopKLogits:
    ids_T = torch.as_tensor(episode.input_ids_T)
    measured = measure(teacher.model(input_ids=ids_T[None]).logits[0, :-1].float(), ids_T[1:])
    kept = top_k(measured, k=8)
    return TopKLogits(
        sample_id=episode.sample_id,
        first_target=1,
        token_ids_PK=kept.token_ids_PK.numpy(),
        logprobs_PK=kept.logprobs_PK.numpy(),
        rest_logprobs_P=kept.rest_logprobs_P.numpy(),
        next_token_logprobs_P=measured.next_token_logprobs_P.numpy(),
        entropies_P=measured.entropies_P.numpy(),
    )
