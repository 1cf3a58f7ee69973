"""Where the texts of a peer's row begin and end, and whether its columns are of one length."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.imports.peer_files import array_of
from stages.sources.reading.rejects import MalformedRecord


def parts_of(record: Mapping[str, pa.Scalar], num_tokens: int) -> list[slice]:
    """Return the texts of a row: runs of one number above 0 in ``attention_mask``, 0 is padding.

    Without that column a row is one text. Raises MalformedRecord for a mask of another length.
    """
    if "attention_mask" not in record:
        return [slice(0, num_tokens)]
    mask_T = array_of(record["attention_mask"], "attention_mask", np.int64)
    if len(mask_T) != num_tokens:
        raise MalformedRecord(
            "columns of unequal lengths", f"attention_mask {len(mask_T)}, input_ids {num_tokens}"
        )
    marks = [0, *(np.flatnonzero(np.diff(mask_T)) + 1).tolist(), num_tokens]
    runs = [slice(start, end) for start, end in pairwise(marks)]
    return [run for run in runs if run.start < run.stop and mask_T[run.start] > 0]


def shape_problem(
    ids_T: npt.NDArray[Any], labels_T: npt.NDArray[Any], *entries_TK: npt.NDArray[Any]
) -> str:
    """Return what of the lengths of a row's columns cannot be, "" if nothing.

    The teacher's columns have one shape, and an entry for each token or fewer.
    """
    shapes = {each.shape for each in entries_TK}
    if len(ids_T) == len(labels_T) and len(shapes) == 1 and len(entries_TK[0]) <= len(ids_T):
        return ""
    found = ", ".join(map(str, sorted(shapes)))
    return f"{len(ids_T)} input_ids, {len(labels_T)} labels, the teacher's columns {found}"
