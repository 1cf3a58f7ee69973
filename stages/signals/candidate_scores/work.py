"""The work of ``candidate_scores``: prompts run once, and only what a candidate adds to them.

With P the prompt (demonstrations and query) and c a candidate's tokens, the score is
``sum_t log p(c_t | P, c_<t)``. The state that predicts ``c_0`` is the prompt's last, for every
candidate; the others need the prompt followed by ``c_<t``. So an episode needs the sequences
``P + c[:-1]``, less those that begin another one: candidates of one token cost one row together,
and the engine is asked to run what the others share once.

Cost for N candidates of L tokens after a prompt of T: T + N (L - 1) tokens where the engine shares
the whole prompt (transformers), a block or less a sequence more with vLLM's prefix cache; scored
apart they take N (T + L). ``benchmarks/capture/candidates.py`` measures it.

Dimensions: R = states of an episode, N = candidates, M = candidate tokens, D = hidden width,
V = vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from schemas.tables.candidate_scores import CandidateScores
from schemas.tables.episodes import EPISODES, Episode, split_candidates
from stages.models.engines.engine import Engine, open_model
from stages.models.engines.sequences import TokenIds, require_room
from stages.signals.candidate_scores.stage import CandidateScoresStage
from stages.signals.scoring.logits import logprobs_of
from stages.stage import Rejected, StageContext, Work

F64Array = npt.NDArray[np.float64]


@contextmanager
def open_work(stage: CandidateScoresStage, context: StageContext) -> Iterator[Work]:
    """Start the engine of ``stage.model``; the work scores one shard of episodes."""
    model = context.models[stage.model]
    with open_model(model, context.engine, share_prefixes=True) as engine:
        context.notes["head_check"] = engine.head_check

        def work(shard: pa.Table) -> Iterable[CandidateScores | Rejected]:
            episodes = [episode for batch in shard.to_batches() for episode in EPISODES.rows(batch)]
            requests = [Branches.of(episode) for episode in episodes]
            longest = max((request.longest for request in requests), default=0)
            require_room(engine, longest, context.engine)
            return score_candidates(engine, requests)

        yield work


@dataclass(frozen=True, slots=True)
class Branches:
    """What one episode asks of the engine.

    ``sequences`` are prompt + branch; candidate token m is predicted by state ``rows_M[m]`` of the
    episode's states, which are the last ``counts[i]`` of each sequence i, end to end.
    """

    sample_id: str
    candidates: list[TokenIds]
    sequences: list[TokenIds]
    counts: list[int]
    rows_M: npt.NDArray[np.int64]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence) for sequence in self.sequences)

    @classmethod
    def of(cls, episode: Episode) -> "Branches":
        """Lay out the fewest sequences that hold every state the candidates need."""
        prompt_T = episode.input_ids_T[: episode.answer_start]
        candidates = split_candidates(episode.candidate_ids_C, episode.candidate_lengths_N)
        candidates = candidates or [episode.input_ids_T[episode.answer_start :]]
        leaves = _leaves([tuple(candidate[:-1].tolist()) for candidate in candidates])
        counts = [len(leaf) + 1 for leaf in leaves]
        starts = np.cumsum([0, *counts])[:-1]
        home = {leaf[:n]: i for i, leaf in enumerate(leaves) for n in range(len(leaf) + 1)}
        rows = [starts[home[tuple(c[:-1].tolist())]] + np.arange(len(c)) for c in candidates]
        sequences = [np.concatenate([prompt_T, np.asarray(leaf, np.int64)]) for leaf in leaves]
        return cls(episode.sample_id, candidates, sequences, counts, np.concatenate(rows))


def _leaves(branches: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return those branches that begin no other: in order, the next one tells."""
    ordered = sorted(set(branches))
    followed = [*ordered[1:], ()]
    return [a for a, b in zip(ordered, followed, strict=True) if b[: len(a)] != a or not b]


def score_candidates(
    engine: Engine, requests: Sequence[Branches]
) -> Iterator[CandidateScores | Rejected]:
    """Yield one row, or one rejection, for each episode, in order."""
    fitting = [request for request in requests if request.longest <= engine.max_length]
    sequences = [sequence for request in fitting for sequence in request.sequences]
    counts = [count for request in fitting for count in request.counts]
    states = iter(engine.last_hidden_states(sequences, counts))
    for request in requests:
        if request.longest > engine.max_length:
            reason = f"longer than the model's window of {engine.max_length} tokens"
            yield Rejected(request.sample_id, reason)
            continue
        hidden_RD = torch.cat([next(states) for _ in request.sequences])
        token_ids_M = np.concatenate(request.candidates)
        logprobs_M = logprobs_of(engine.head, hidden_RD, request.rows_M, token_ids_M)
        lengths_N = np.array([len(candidate) for candidate in request.candidates], np.int32)
        starts_N = np.cumsum([0, *lengths_N[:-1]])
        scores_N = np.add.reduceat(logprobs_M, starts_N)
        if not np.isfinite(scores_N).all():
            yield Rejected(request.sample_id, "non-finite logits")
            continue
        yield CandidateScores(
            sample_id=request.sample_id,
            candidate_logprobs_N=scores_N.astype(np.float32),
            candidate_num_tokens_N=lengths_N,
        )
