"""Token sequences on their way into an engine: checked, and cut into windows."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from schemas.errors import EngineError

TokenIds = npt.NDArray[np.integer]

_WINDOW_BYTES = 1 << 30


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


def windows(sequences: Sequence[TokenIds], *, bytes_per_token: int) -> Iterator[list[TokenIds]]:
    """Cut ``sequences`` into runs whose hidden states take about 1 GiB, in order.

    An engine gives a run back when all of it is done, so this bounds the memory of a long shard.
    Where it cuts depends on the sequences and the model only, so that a re-run cuts alike.
    """
    window: list[TokenIds] = []
    used = 0
    for ids_T in sequences:
        needed = len(ids_T) * bytes_per_token
        if window and used + needed > _WINDOW_BYTES:
            yield window
            window, used = [], 0
        window.append(ids_T)
        used += needed
    if window:
        yield window
