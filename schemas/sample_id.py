"""The key of a row: a hash of its token ids and spans, so nothing is ever paired by position."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

HEX_DIGITS = 24  # 96 bits: a collision among 10^12 rows has a chance of about 6e-6


def sample_id_of(input_ids_T: npt.NDArray[Any], spans: Iterable[tuple[int, int]] = ()) -> str:
    """Return 24 hex digits naming these token ids and ``(start, end)`` spans.

    The hash does not depend on the integer width the ids are held in, nor on the machine.
    """
    ids_T = np.ascontiguousarray(input_ids_T, dtype="<i8")
    digest = hashlib.blake2b(len(ids_T).to_bytes(8, "little"), digest_size=HEX_DIGITS // 2)
    digest.update(ids_T.data)
    if listed := list(spans):
        digest.update(np.asarray(listed, dtype="<i8").reshape(-1, 2).tobytes())
    return digest.hexdigest()


def sample_id_of_part(
    input_ids_T: npt.NDArray[Any], spans_S2: npt.NDArray[Any], source_id: str
) -> str:
    """Return the key of token ids with scored spans, made of another row (``""``: of none)."""
    spans = np.asarray(spans_S2, np.int64).reshape(-1, 2)
    listed = [(int(start), int(end)) for start, end in spans]
    return sample_id_of(input_ids_T, [*listed, *id_spans(source_id)])


def is_sample_id(text: str) -> bool:
    """Return whether a text has the form of one."""
    return len(text) == HEX_DIGITS and set(text) <= set("0123456789abcdef")


def id_spans(sample_id: str) -> list[tuple[int, int]]:
    """Return another row's key as a span to be hashed with one's own; none for an empty text."""
    half = HEX_DIGITS // 2
    return [(int(sample_id[:half], 16), int(sample_id[half:], 16))] if sample_id else []
