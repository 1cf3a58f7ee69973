"""Draw distinct subsets of an episode's demonstrations, from seed and content alone.

Two subsets are the same when their token sequences are: demonstrations that are equal as text make
equal subsets of different indices. Demonstrations keep their order.

Dimensions: M = demonstrations.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.distribution import uniforms
from schemas.tables.episodes import Episode, subset_input_ids
from stages.models.engines.sequences import TokenIds
from stages.signals.subset_preferences.stage import SubsetPreferencesStage

Subset = tuple[int, ...]
_LISTED = 12  # demonstrations up to which all subsets are listed: 4,096 of them
_ATTEMPTS = 200  # draws for each subset wanted; beyond that many two are hardly ever equal


@dataclass(frozen=True, slots=True)
class DrawnSubsets:
    """Distinct subsets of one episode's demonstrations, and the token ids of each."""

    subsets: list[Subset]
    input_ids: list[TokenIds]


def draw_subsets(
    stage: SubsetPreferencesStage, episode: Episode, similarities_M: npt.NDArray[Any] | None = None
) -> DrawnSubsets:
    """Draw ``num_subsets`` subsets, or all there are where that is fewer.

    ``similarities_M`` are those of the demonstrations to the query, for the ``similarity`` sampler.
    """
    found: dict[bytes, tuple[Subset, TokenIds]] = {}
    for subset in _in_random_order(stage, episode, similarities_M):
        ids_T = subset_input_ids(
            episode.input_ids_T, episode.demonstrations_M3, episode.query_start, subset
        )
        found.setdefault(ids_T.tobytes(), (subset, ids_T))
        if len(found) == stage.num_subsets:
            break
    return DrawnSubsets([s for s, _ in found.values()], [ids_T for _, ids_T in found.values()])


def _in_random_order(
    stage: SubsetPreferencesStage, episode: Episode, similarities_M: npt.NDArray[Any] | None
) -> Iterator[Subset]:
    """Yield subsets to try; where all of them can be listed, all come in the end."""
    num = len(episode.demonstrations_M3)
    smallest = 0 if stage.sampler.allow_empty else 1
    numbers = _Numbers(f"{stage.seed}:{episode.sample_id}")
    if similarities_M is not None:
        yield from _by_similarity(stage, similarities_M, numbers, smallest)
    elif num > _LISTED:
        for _ in range(_ATTEMPTS * stage.num_subsets):
            subset = tuple(m for m in range(num) if numbers.below(2))
            if len(subset) >= smallest:
                yield subset
    if num <= _LISTED:
        sizes = range(smallest, num + 1)
        every = [subset for size in sizes for subset in combinations(range(num), size)]
        yield from numbers.sample(every, len(every))


def _by_similarity(
    stage: SubsetPreferencesStage,
    similarities_M: npt.NDArray[Any],
    numbers: "_Numbers",
    smallest: int,
) -> Iterator[Subset]:
    """Yield subsets whose number of similar demonstrations goes round all it can be.

    The number of dissimilar ones is uniform, and which of either kind too.
    """
    by_similarity = np.argsort(-similarities_M, kind="stable").tolist()
    half = -(-len(by_similarity) // 2)
    similar, dissimilar = by_similarity[:half], by_similarity[half:]
    counts = numbers.sample(range(half + 1), half + 1)
    for attempt in range(_ATTEMPTS * stage.num_subsets):
        num_similar = counts[attempt % len(counts)]
        least = max(smallest - num_similar, 0)
        if least <= len(dissimilar):
            num_dissimilar = least + numbers.below(len(dissimilar) + 1 - least)
            kept = numbers.sample(similar, num_similar) + numbers.sample(dissimilar, num_dissimilar)
            yield tuple(sorted(kept))


class _Numbers:
    """Random whole numbers that a key fixes on every machine and under every version."""

    def __init__(self, key: str) -> None:
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        self._key = int.from_bytes(digest, "little")
        self._drawn: list[float] = []
        self._used = 0

    def below(self, limit: int) -> int:
        """Draw one of 0 .. limit - 1."""
        if self._used == len(self._drawn):
            self._drawn = uniforms(self._key, 2 * len(self._drawn) + 64, 1)[:, 0].tolist()
        self._used += 1
        return int(self._drawn[self._used - 1] * limit)

    def sample(self, items: Sequence[Any], count: int) -> list[Any]:
        """Draw ``count`` of ``items`` without replacement, in random order."""
        left = list(items)
        for place in range(count):
            chosen = place + self.below(len(left) - place)
            left[place], left[chosen] = left[chosen], left[place]
        return left[:count]
