"""The work of ``subset_preferences``: run each distinct sequence once, sum, rank.

Cost: N sequences an episode, on average a little over half its length each; equal sequences (of
draws that share a query, say) are run once a shard, and the engine runs text that sequences share
at their start once where it can. That is about N / 2 times what ``teacher_logits`` takes on the
episodes. Only the answer's positions meet the head.

Dimensions: N = subsets, A = answer tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.errors import ConfigError
from schemas.tables.episodes import EPISODES, Episode
from schemas.tables.subset_preferences import SubsetPreferences
from stages.models.engines.engine import Engine, open_model
from stages.models.engines.sequences import TokenIds, require_room
from stages.signals.scoring.logits import logprobs_of
from stages.signals.subset_preferences.sampling import DrawnSubsets, draw_subsets
from stages.signals.subset_preferences.similarity import SentenceSimilarity
from stages.signals.subset_preferences.stage import SimilaritySampler, SubsetPreferencesStage
from stages.stage import Rejected, StageContext, Work


@contextmanager
def open_work(stage: SubsetPreferencesStage, context: StageContext) -> Iterator[Work]:
    """Start the engine of ``stage.model``; the work scores one shard of episodes."""
    model = context.models[stage.model]
    similarity = None
    if isinstance(stage.sampler, SimilaritySampler):
        encoder = context.models[stage.sampler.encoder]
        similarity = SentenceSimilarity(encoder.path, texts_of=model.path)
    with open_model(model, context.engine, share_prefixes=True) as engine:
        context.notes["head_check"] = engine.head_check

        def work(shard: pa.Table) -> Iterable[SubsetPreferences | Rejected]:
            episodes = [episode for batch in shard.to_batches() for episode in EPISODES.rows(batch)]
            _require_enough_demonstrations(stage, episodes)
            drawn = [
                draw_subsets(stage, episode, similarity.of(episode) if similarity else None)
                for episode in episodes
            ]
            lengths = (len(ids_T) for subsets in drawn for ids_T in subsets.input_ids)
            require_room(engine, max(lengths, default=0), context.engine)
            return score_subsets(stage, engine, episodes, drawn)

        yield work


def _require_enough_demonstrations(
    stage: SubsetPreferencesStage, episodes: Sequence[Episode]
) -> None:
    most = max((len(episode.demonstrations_M3) for episode in episodes), default=0)
    possible = 2**most - (not stage.sampler.allow_empty)
    if episodes and possible < stage.num_subsets:
        raise ConfigError(
            f"num_subsets is {stage.num_subsets}, but episodes of {most} demonstrations have "
            f"{possible} subsets: lower it, or give the episodes more demonstrations"
        )


def score_subsets(
    stage: SubsetPreferencesStage,
    engine: Engine,
    episodes: Sequence[Episode],
    drawn: Sequence[DrawnSubsets],
) -> Iterator[SubsetPreferences | Rejected]:
    """Yield one row, or one rejection, for each episode, in order."""
    reasons = [_reason(stage, engine, subsets) for subsets in drawn]
    wanted: dict[bytes, tuple[TokenIds, int]] = {}
    for episode, subsets, reason in zip(episodes, drawn, reasons, strict=True):
        count = len(episode.input_ids_T) - episode.answer_start
        for ids_T in () if reason else subsets.input_ids:
            key = ids_T[:-1].tobytes()
            wanted[key] = (ids_T[:-1], max(count, wanted.get(key, (ids_T, 0))[1]))
    states = engine.last_hidden_states(
        [ids_T for ids_T, _ in wanted.values()], [count for _, count in wanted.values()]
    )
    hidden = dict(zip(wanted, states, strict=True))
    for episode, subsets, reason in zip(episodes, drawn, reasons, strict=True):
        if reason:
            yield Rejected(episode.sample_id, reason)
            continue
        answer_A = episode.input_ids_T[episode.answer_start :]
        rows_A = np.arange(len(answer_A))
        scores_N = np.array(
            [
                logprobs_of(
                    engine.head, hidden[ids_T[:-1].tobytes()][-len(answer_A) :], rows_A, answer_A
                ).sum()
                for ids_T in subsets.input_ids
            ],
            np.float32,
        )
        if not np.isfinite(scores_N).all():
            yield Rejected(episode.sample_id, "non-finite logits")
            continue
        yield SubsetPreferences(
            sample_id=episode.sample_id,
            subset_demonstrations_S=np.array([m for s in subsets.subsets for m in s], np.int32),
            subset_sizes_N=np.array([len(s) for s in subsets.subsets], np.int32),
            answer_logprobs_N=scores_N,
            num_answer_tokens=len(answer_A),
            ranks_N=ranks_of(scores_N, tie_tolerance=stage.tie_tolerance),
        )


def _reason(stage: SubsetPreferencesStage, engine: Engine, drawn: DrawnSubsets) -> str:
    if len(drawn.subsets) < stage.num_subsets:
        return f"fewer than {stage.num_subsets} distinct subsets of its demonstrations"
    if max(len(ids_T) for ids_T in drawn.input_ids) > engine.max_length:
        return f"longer than the model's window of {engine.max_length} tokens"
    return ""


def ranks_of(scores_N: npt.NDArray[Any], *, tie_tolerance: float) -> npt.NDArray[np.int32]:
    """Return ranks [N], 1 for the highest score; ties share the smallest rank of theirs.

    In falling order, a score ties with the one before it when it is at most ``tie_tolerance``
    lower; so a chain of small steps is one tie.
    """
    order = np.argsort(-scores_N, kind="stable")
    falls = -np.diff(scores_N[order].astype(np.float64))
    ranks = [1]
    for place, fall in enumerate(falls.tolist(), start=2):
        ranks.append(place if fall > tie_tolerance else ranks[-1])
    ranks_N = np.empty(len(scores_N), np.int32)
    ranks_N[order] = ranks
    return ranks_N
