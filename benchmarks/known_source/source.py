"""A source of sequences whose next-token distribution is known: topics of n-grams that copy.

A sequence has one of M topics, drawn evenly and never told. Its first token is uniform. Each later
token is, with the topic's probability ``copy_M``, one of the last ``window`` tokens, each as likely
as the other; else it is drawn from the topic's distribution for the group of the token before:

    p_m(x_t | x_<t) = (1 - c_m) ngrams_m[group[x_{t-1}], x_t] + c_m #{j in [t-w, t): x_j = x_t} / w
    p(x_t | x_<t)   = sum_m p(m | x_<t) p_m(x_t | x_<t),  p(m | x_<t) ~ prod_{s<t} p_m(x_s | x_<s)

with w the window, or all tokens before where they are fewer. A group's distribution falls as
rank^-s over a permutation of the vocabulary of its own; the exponents s lie evenly between two, so
that there are sure positions and flat ones.

Dimensions: B = sequences, T = tokens, M = topics, G = groups, V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class KnownSource:
    """The process: its tables in float64, ``group_V`` and sizes."""

    ngrams_MGV: Array
    group_V: Array
    copy_M: Array
    window: int

    @classmethod
    def drawn(
        cls,
        *,
        vocab_size: int,
        groups: int,
        copies: Sequence[float],
        window: int,
        exponents: tuple[float, float],
        seed: int,
    ) -> "KnownSource":
        """Draw permutations, exponents and groups; ``copies`` are the topics' shares of copies."""
        rng = np.random.default_rng(seed)
        shape = (len(copies), groups)
        exponents_MG = rng.permutation(np.linspace(*exponents, shape[0] * shape[1])).reshape(shape)
        falling_MGV = np.arange(1, vocab_size + 1) ** -exponents_MG[:, :, None]
        falling_MGV /= falling_MGV.sum(axis=2, keepdims=True)
        ngrams_MGV = rng.permuted(falling_MGV, axis=2)
        group_V = rng.permutation(np.arange(vocab_size) % groups)
        return cls(ngrams_MGV, group_V, np.array(copies), window)

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""
        return int(self.ngrams_MGV.shape[2])

    def sequences(self, count: int, length: int, seed: int) -> Array:
        """Draw sequences, int64 [B, T]; equal seeds give equal ones."""
        rng = np.random.default_rng(seed)
        topic_B = rng.integers(len(self.copy_M), size=count)
        sums_MGV = self.ngrams_MGV.cumsum(axis=2)
        ids_BT = np.empty((count, length), np.int64)
        ids_BT[:, 0] = rng.integers(self.vocab_size, size=count)
        rows_B = np.arange(count)
        for t in range(1, length):
            back_B = rng.integers(1, min(t, self.window) + 1, size=count)
            copied_B = ids_BT[rows_B, t - back_B]
            sums_BV = sums_MGV[topic_B, self.group_V[ids_BT[:, t - 1]]]
            drawn_B = (sums_BV < rng.random((count, 1)) * sums_BV[:, -1:]).sum(axis=1)
            ids_BT[:, t] = np.where(rng.random(count) < self.copy_M[topic_B], copied_B, drawn_B)
        return ids_BT

    def probs(self, ids_BT: Array) -> Array:
        """Return [B, T, V]: at t the distribution of the token after ``ids_BT[:, :t + 1]``."""
        num_rows, length = ids_BT.shape
        one_hot_BTV = np.eye(self.vocab_size)[ids_BT]
        counts_BTV = one_hot_BTV.cumsum(axis=1)
        counts_BTV[:, self.window :] -= counts_BTV[:, : -self.window].copy()
        copied_BTV = counts_BTV / counts_BTV.sum(axis=2, keepdims=True)
        probs_BTV: Array = np.zeros_like(copied_BTV)
        of_topics = []
        loglik_BTM = np.zeros((num_rows, length, len(self.copy_M)))
        for m, copy in enumerate(self.copy_M):
            ngrams_BTV = self.ngrams_MGV[m, self.group_V[ids_BT]]
            of_topics.append((1.0 - copy) * ngrams_BTV + copy * copied_BTV)
            told_BT1 = np.take_along_axis(of_topics[m][:, :-1], ids_BT[:, 1:, None], axis=2)
            loglik_BTM[:, 1:, m] = np.log(told_BT1[:, :, 0]).cumsum(axis=1)
        posterior_BTM = np.exp(loglik_BTM - loglik_BTM.max(axis=2, keepdims=True))
        posterior_BTM /= posterior_BTM.sum(axis=2, keepdims=True)
        for m, of_topic_BTV in enumerate(of_topics):
            probs_BTV += posterior_BTM[:, :, m, None] * of_topic_BTV
        return probs_BTV
