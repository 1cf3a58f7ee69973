"""A row that another program captured: what it says is held to account, and made rows of ours.

Dimensions: T = tokens of the row, P = scored positions, K = kept tokens, S = scored spans.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.sample_id import sample_id_of
from schemas.table import MOST_LOGPROB
from schemas.tables.conversations import Conversation
from schemas.tables.documents import Document
from schemas.tables.teacher_logits import TopKLogits
from stages.sources.reading.rejects import MalformedRecord, UnusableRecord

Array = npt.NDArray[Any]
IMPOSSIBLE = -1e4  # peers write log-probs from here on for a token of probability 0
MAX_SUM_ERROR = 0.01  # of a position's probabilities: what float16 or bfloat16 log-probs cost
MAX_FITTED_SUM = 2.0  # of those that a codec has fitted a curve to


@dataclass(frozen=True, slots=True)
class PeerRow:
    """Token ids, and of each scored token ``targets_P`` the K likeliest tokens before it was read.

    Ids are int64, log-probs float64 of temperature 1, the places of scored tokens rise. Of a codec
    that rounds (``is_rounded``) they may come out of order, and sum above one at positions that
    are then divided by their sum: ``num_rescaled`` of them, once the row is checked.
    """

    input_ids_T: Array
    targets_P: Array
    token_ids_PK: Array
    logprobs_PK: Array
    is_rounded: bool = False
    num_rescaled: int = 0

    @property
    def share_of_next(self) -> tuple[int, int]:
        """At how many positions the next token is among the K, and how many there are."""
        return int(self._is_next_PK.any(axis=1).sum()), len(self.targets_P)

    @property
    def _is_next_PK(self) -> Array:
        return np.asarray(self.token_ids_PK == self.input_ids_T[self.targets_P][:, None])

    def checked(self, *, k: int, vocab_size: int, is_renormalised: bool) -> "PeerRow":
        """Return the row with its tokens by falling log-prob; raises UnusableRecord with a reason.

        With ``is_renormalised`` a position's probabilities sum to one over its K tokens.
        """
        if len(self.input_ids_T) < 2 or not len(self.targets_P):
            raise UnusableRecord("no scored token", f"{len(self.input_ids_T)} tokens, none scored")
        if self.token_ids_PK.shape[1] != k:
            raise MalformedRecord(
                "unequal k", f"{self.token_ids_PK.shape[1]} tokens a position, expected {k}"
            )
        for ids in (self.input_ids_T, self.token_ids_PK):
            if ids.min() < 0 or ids.max() >= vocab_size:
                bad = int(ids.max() if ids.max() >= vocab_size else ids.min())
                raise MalformedRecord(
                    "token ids outside the vocabulary", f"id {bad}, expected 0 to {vocab_size - 1}"
                )
        if np.isnan(self.logprobs_PK).any():
            raise MalformedRecord("log-probs that are no number", "a log-prob is NaN")
        if (most := float(self.logprobs_PK.max())) > MOST_LOGPROB:
            raise MalformedRecord("log-probs above 0", f"a log-prob is {most:.4g}, expected <= 0")
        return self._in_order()._of_right_mass(is_renormalised)

    def _in_order(self) -> "PeerRow":
        logprobs_PK = np.where(self.logprobs_PK <= IMPOSSIBLE, -np.inf, self.logprobs_PK)
        row = replace(self, logprobs_PK=logprobs_PK)
        if self.is_rounded:
            order_PK = np.argsort(-logprobs_PK, axis=1, kind="stable")
            columns = (self.token_ids_PK, logprobs_PK)
            ids_PK, logprobs_PK = (np.take_along_axis(each, order_PK, 1) for each in columns)
            row = replace(self, token_ids_PK=ids_PK, logprobs_PK=logprobs_PK)
        stored_PK = logprobs_PK.astype(np.float16)
        if (stored_PK[:, 1:] > stored_PK[:, :-1]).any():
            raise MalformedRecord("log-probs out of order", "log-probs rise within a position")
        ordered_PK = np.sort(row.token_ids_PK, axis=1)
        if (ordered_PK[:, 1:] == ordered_PK[:, :-1]).any():
            raise MalformedRecord("a token twice at a position", "a kept token stands there twice")
        return row

    def _of_right_mass(self, is_renormalised: bool) -> "PeerRow":
        mass_P = np.exp(self.logprobs_PK).sum(axis=1)
        limit = MAX_FITTED_SUM if self.is_rounded else 1 + MAX_SUM_ERROR
        if (most := float(mass_P.max())) > limit:
            raise MalformedRecord(
                "probabilities that sum above 1", f"a position's sum is {most:.4f}, expected <= 1"
            )
        least = float(mass_P.min())
        if least == 0:
            raise MalformedRecord("a position without mass", "all its log-probs are minus infinity")
        if is_renormalised and least < 1 - MAX_SUM_ERROR:
            raise MalformedRecord(
                "probabilities that sum below 1",
                f"a position's sum is {least:.4f}, expected 1: this format's top sums to one",
            )
        is_above_P = mass_P > 1
        if not self.is_rounded or not is_above_P.any():
            return self
        logprobs_PK = self.logprobs_PK - np.log(np.maximum(mass_P, 1))[:, None]
        return replace(self, logprobs_PK=logprobs_PK, num_rescaled=int(is_above_P.sum()))

    def signals(self, sample_id: str, *, is_renormalised: bool) -> TopKLogits:
        """Return what is known of the distributions; NaN stands for what is not.

        A renormalised top-k says nothing of the mass outside it, of which none is recorded, nor of
        the log-prob that the next token has in the whole vocabulary.
        """
        with np.errstate(over="ignore", divide="ignore"):  # to minus infinity, which is meant
            logprobs_PK = self.logprobs_PK.astype(np.float16)
            rest_P = np.log(np.maximum(1 - np.exp(self.logprobs_PK).sum(axis=1), 0))
        next_P = np.where(self._is_next_PK, self.logprobs_PK, 0).sum(axis=1)
        is_known_P = self._is_next_PK.any(axis=1) & np.isfinite(next_P)
        if is_renormalised:
            rest_P, is_known_P = np.full_like(rest_P, -np.inf), np.zeros_like(is_known_P)
        return TopKLogits(
            sample_id=sample_id,
            first_target=int(self.targets_P[0]),
            token_ids_PK=self.token_ids_PK.astype(np.uint32),
            logprobs_PK=logprobs_PK,
            rest_logprobs_P=rest_P.astype(np.float16),
            next_token_logprobs_P=np.where(is_known_P, next_P, np.nan).astype(np.float16),
            entropies_P=np.full(len(self.targets_P), np.nan, np.float16),
        )

    def document(self, split: str) -> Document:
        """Return the tokens, of which all but the first are scored."""
        return Document(
            sample_id=sample_id_of(self.input_ids_T),
            split=split,
            input_ids_T=self.input_ids_T.astype(np.uint32),
        )

    def conversation(self, split: str) -> Conversation:
        """Return the tokens with the spans that are scored."""
        gaps = np.flatnonzero(np.diff(self.targets_P) > 1) + 1
        runs = np.split(self.targets_P, gaps)
        row = Conversation(
            sample_id="",
            split=split,
            source_id="",
            input_ids_T=self.input_ids_T.astype(np.uint32),
            scored_S2=np.array([(run[0], run[-1] + 1) for run in runs], np.int32),
            is_cut=False,
        )
        return replace(row, sample_id=row.hashed_id)
