"""Token sequences on their way into an engine: checked, cut into windows, grouped by prefix."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from schemas.errors import ConfigError, EngineError
from stages.models.spec import EngineOptions

TokenIds = npt.NDArray[np.integer]

WINDOW_BYTES = 1 << 30


def check_sequences(sequences: Sequence[TokenIds], *, max_length: int, vocab_size: int) -> None:
    """Raise EngineError for a sequence that no forward pass can take."""
    for index, ids_T in enumerate(sequences):
        place = f"sequence {index} of {len(sequences)}"
        if not 0 < len(ids_T) <= max_length:
            raise EngineError(
                f"{place} has {len(ids_T)} tokens, the engine takes 1 to {max_length}: reject the "
                f"row or raise max_model_len"
            )
        if not 0 <= ids_T.min() <= ids_T.max() < vocab_size:
            raise EngineError(
                f"{place} has token ids from {ids_T.min()} to {ids_T.max()}, the model has 0 to "
                f"{vocab_size - 1}: use the model's own tokenizer"
            )


class HasWindow(Protocol):
    """An engine or a generator: ``max_length`` is what settings or memory leave of ``window``."""

    max_length: int
    window: int


def require_room(
    engine: HasWindow, longest: int, options: EngineOptions, *, what: str = "a row"
) -> None:
    """Raise ConfigError for a row that only the engine's settings or its memory keep out.

    Those are no part of a table's name: to reject by them would give one name two contents. What
    the model's own window keeps out is rejected row by row, and no error.
    """
    max_length = engine.max_length
    if max_length >= engine.window or longest <= max_length:
        return
    if options.max_model_len is None:
        raise ConfigError(
            f"the engine's memory holds {max_length} tokens of a row, {what} has {longest}: give "
            f"it more by execution.engine.kv_cache_memory_bytes, gpu_memory_utilization or "
            f"tensor_parallel_size"
        )
    raise ConfigError(
        f"execution.engine.max_model_len is {options.max_model_len}, {what} has {longest} tokens: "
        f"raise it, or leave it out to reject only what exceeds the model's own window"
    )


def windows(sequences: Sequence[TokenIds], *, bytes_per_token: int) -> Iterator[list[TokenIds]]:
    """Cut ``sequences`` into runs whose hidden states take about 1 GiB, in order.

    An engine gives a run back when all of it is done, so this bounds the memory of a long shard.
    Where it cuts depends on the sequences and the model only, so that a re-run cuts alike.
    """
    window: list[TokenIds] = []
    used = 0
    for ids_T in sequences:
        needed = len(ids_T) * bytes_per_token
        if window and used + needed > WINDOW_BYTES:
            yield window
            window, used = [], 0
        window.append(ids_T)
        used += needed
    if window:
        yield window


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Sequences, by index, whose first ``shared`` tokens are the same."""

    members: list[int]
    shared: int


def prefix_order(sequences: Sequence[TokenIds]) -> list[int]:
    """Return indices in the order of token ids: sequences with one beginning lie together."""
    return sorted(range(len(sequences)), key=lambda index: sequences[index].tolist())


def prefix_groups(
    sequences: Sequence[TokenIds], counts: Sequence[int], *, max_tokens: int
) -> Iterator[PrefixGroup]:
    """Group sequences so that computing each group's prefix once saves the most tokens.

    The last ``counts[i]`` tokens of a sequence are never part of a prefix, as their states are
    wanted. What follows the prefix takes at most ``max_tokens`` padded tokens in a group.
    """
    group: list[int] = []
    shared = 0
    for index in prefix_order(sequences):
        own = len(sequences[index]) - counts[index]
        if group:
            common = min(shared, own, common_prefix(sequences[group[0]], sequences[index]))
            longest = max(len(sequences[member]) for member in [*group, index]) - common
            saves = len(group) * common > (len(group) - 1) * shared
            if saves and (len(group) + 1) * longest <= max_tokens:
                group, shared = [*group, index], common
                continue
            yield PrefixGroup(group, shared if len(group) > 1 else 0)
        group, shared = [index], own
    if group:
        yield PrefixGroup(group, shared if len(group) > 1 else 0)


def common_prefix(a_T: TokenIds, b_T: TokenIds) -> int:
    """Return with how many tokens both begin."""
    length = min(len(a_T), len(b_T))
    differs = np.flatnonzero(a_T[:length] != b_T[:length])
    return int(differs[0]) if len(differs) else length
