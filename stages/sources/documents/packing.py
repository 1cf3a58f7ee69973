"""Cut token ids into rows: ``pack`` fills rows of one length, ``truncate`` keeps one a document.

Dimensions: T = tokens of one document or row, N = tokens of many, B = rows, L = row length.
"""

from collections.abc import Sequence

import numpy as np

from stages.sources.reading.tokens import IdArray


def pack(
    documents: Sequence[IdArray], carry_T: IdArray, *, length: int, eos_id: int
) -> tuple[IdArray, IdArray]:
    """Return rows [B, length] and what is left over, fewer than ``length`` ids.

    The stream is ``carry_T``, then each document followed by one ``eos_id``; rows are its
    successive pieces, so a document may begin or end inside a row. The left-over is the next
    call's ``carry_T``; the one of the last call fills no row and is dropped by the caller.
    """
    eos_1 = np.array([eos_id], np.uint32)
    stream_N = np.concatenate([carry_T, *(part for ids_T in documents for part in (ids_T, eos_1))])
    used = len(stream_N) - len(stream_N) % length
    return stream_N[:used].reshape(-1, length), stream_N[used:].copy()


def truncate(documents: Sequence[IdArray], *, length: int) -> tuple[list[IdArray], int]:
    """Return the first ``length`` ids of each document, and how many documents were cut."""
    cut = sum(len(ids_T) > length for ids_T in documents)
    return [ids_T[:length] for ids_T in documents], cut
