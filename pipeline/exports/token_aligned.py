"""A row's entries at the tokens that predict them: one entry for each token, filler elsewhere.

Trainers that take teacher columns of the length of ``input_ids`` compare entry t with the student's
logits at token t, which are about token t + 1.

Dimensions: T = tokens of a row, P = scored positions, K = kept tokens.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from stages.student.batches.top_k_rows import TopKRow

Array = npt.NDArray[Any]
IMPOSSIBLE = -1e4  # a log-prob whose exponential is 0, finite in half precision too


def token_aligned(row: TopKRow) -> tuple[Array, Array, Array]:
    """Return ids (int32), log-probs (float32) and a mask (int8), [T, K]: 1 for a real entry.

    Entry j of the row lies at ``targets_P[j] - 1``. A token of probability 0 is filler too: the
    product of 0 and its log-prob is no number.
    """
    shape = len(row.input_ids_T), row.token_ids_PK.shape[1]
    ids_TK, mask_TK = np.zeros(shape, np.int32), np.zeros(shape, np.int8)
    logprobs_TK = np.full(shape, IMPOSSIBLE, np.float32)
    is_real_PK = np.isfinite(row.logprobs_PK)
    places_P = row.targets_P - 1
    ids_TK[places_P] = row.token_ids_PK
    mask_TK[places_P] = is_real_PK
    logprobs_TK[places_P] = np.where(is_real_PK, row.logprobs_PK, np.float32(IMPOSSIBLE))
    return ids_TK, logprobs_TK, mask_TK
