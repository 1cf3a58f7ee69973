"""Layouts that others publish for cached distributions, re-implemented here to compare with.

Everything below is our own code, written from public descriptions (a paper, slides, a README's
list of options), not a copy of anybody's. Where a description leaves something open we chose what
looked best for it, and say so. Each layout goes to bytes and back, so that what is measured is what
a reader of those bytes would get.

``rs_kd``: RS-KD (arXiv 2503.16870): N tokens drawn from the teacher with replacement, kept as
distinct ids and counts, three bytes each: a 17-bit id and a 7-bit count. The estimate of p is
count / N, unbiased. The paper counts this payload alone (12 x 3 = 36 bytes at 50 draws on its
teacher); where one position ends and the next begins is not in it. Ids of 2^17 and above are
refused here (an open implementation masks them).

``polynomial_top_k``: the DistillKit 1.0 layout, from the options in its README: the k largest
log-probs in order, ids in ceil(log2 V) bits, the first ``exact_k`` values in bfloat16 and a least
squares fit of the others over the listed terms in float32; one list of bytes a position, in
Parquet as list<list<u8>>. Its recommended settings take 312 bytes a token (k = 128) and its budget
settings 114 (k = 50), both at 16-bit ids. Our choices: terms of x = (1 .. n) / n, unweighted fit.
What is missing is worth zero or is spread uniformly; both rules are offered there.

``bfloat16_top_k``: ids in 16 bits and log-probs in bfloat16, 4 bytes an entry, without container.

Dimensions: P = positions, K = kept entries, N = draws, V = vocabulary, S = bytes of a position.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

U8Array = npt.NDArray[np.uint8]
AnyArray = npt.NDArray[Any]

_ID_BITS, _COUNT_BITS = 17, 7


def pack_draws(drawn_PN: AnyArray) -> tuple[U8Array, AnyArray]:
    """Return RS-KD's bytes [3 E] and the number of distinct ids of each position [P]."""
    num_positions, num_draws = drawn_PN.shape
    if num_draws >= 1 << _COUNT_BITS or int(drawn_PN.max()) >= 1 << _ID_BITS:
        raise ValueError(f"{num_draws} draws of ids up to {drawn_PN.max()}: not in 7 and 17 bits")
    keys = np.arange(num_positions)[:, None] << _ID_BITS | drawn_PN.astype(np.int64)
    distinct_E, counts_E = np.unique(keys, return_counts=True)
    words_E = (distinct_E & (1 << _ID_BITS) - 1) << _COUNT_BITS | counts_E
    packed = words_E.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]
    return packed.reshape(-1), np.bincount(distinct_E >> _ID_BITS, minlength=num_positions)


def unpack_draws(
    packed: U8Array, num_distinct_P: AnyArray, *, num_draws: int
) -> tuple[AnyArray, AnyArray]:
    """Return ids and weights [P, K], K the most distinct ids of a position; spare weights are 0."""
    wide = np.zeros((len(packed) // 3, 4), np.uint8)
    wide[:, :3] = packed.reshape(-1, 3)
    words_E = wide.reshape(-1).view("<u4").astype(np.int64)
    in_use_PK = np.arange(num_distinct_P.max()) < num_distinct_P[:, None]
    ids_PK = np.zeros(in_use_PK.shape, np.int64)
    weights_PK = np.zeros(in_use_PK.shape, np.float32)
    ids_PK[in_use_PK] = words_E >> _COUNT_BITS
    weights_PK[in_use_PK] = (words_E & (1 << _COUNT_BITS) - 1) / num_draws
    return ids_PK, weights_PK


@dataclass(frozen=True)
class PolynomialTopK:
    """Settings of the polynomial layout; ``terms`` are exponents (0.5 is the square root)."""

    vocab_size: int
    k: int
    exact_k: int
    terms: tuple[float, ...]

    @property
    def id_bits(self) -> int:
        """Bits of one id."""
        return (self.vocab_size - 1).bit_length()

    @property
    def bytes_per_position(self) -> int:
        """Ids, exact values, coefficients."""
        return (self.k * self.id_bits + 7) // 8 + 2 * self.exact_k + 4 * len(self.terms)

    def pack(self, ids_PK: AnyArray, logprobs_PK: AnyArray) -> U8Array:
        """Return [P, S] bytes; entries come by falling log-prob."""
        basis = self._basis()
        fitted = logprobs_PK[:, self.exact_k :].astype(np.float64) @ np.linalg.pinv(basis).T
        exact = to_bfloat16(logprobs_PK[:, : self.exact_k])
        parts = [_pack_ids(ids_PK, self.id_bits), exact, fitted.astype("<f4")]
        return np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in parts], axis=1)

    def unpack(self, packed_PS: U8Array) -> tuple[AnyArray, AnyArray]:
        """Return ids and log-probs [P, K]."""
        ends = np.cumsum([(self.k * self.id_bits + 7) // 8, 2 * self.exact_k])
        ids, exact, fitted = (np.ascontiguousarray(p) for p in np.split(packed_PS, ends, axis=1))
        tail = fitted.view("<f4").astype(np.float64) @ self._basis().T
        logprobs_PK = np.concatenate([from_bfloat16(exact.view("<u2")), tail], axis=1)
        return _unpack_ids(ids, self.id_bits, self.k), logprobs_PK.astype(np.float32)

    def _basis(self) -> AnyArray:
        x = np.arange(1, self.k - self.exact_k + 1) / (self.k - self.exact_k)
        return np.stack([x**term for term in self.terms], axis=1)


def recommended(vocab_size: int) -> PolynomialTopK:
    """What its README recommends: about 300 bytes a token."""
    return PolynomialTopK(vocab_size, k=128, exact_k=16, terms=(0, 1, 2, 3, 4, 0.5))


def budget(vocab_size: int) -> PolynomialTopK:
    """What its README calls the budget pick: about 114 bytes a token."""
    return PolynomialTopK(vocab_size, k=50, exact_k=1, terms=(0, 1, 0.5))


def byte_lists(packed_RPS: list[U8Array]) -> pa.Table:
    """Return rows of positions of bytes as the one list<list<u8>> column of a Parquet file."""
    flat = np.concatenate([packed_PS.reshape(-1) for packed_PS in packed_RPS])
    size = packed_RPS[0].shape[1]
    inner = np.arange(0, len(flat) + 1, size, dtype=np.int32)
    outer = np.cumsum([0, *(len(packed_PS) for packed_PS in packed_RPS)]).astype(np.int32)
    positions = pa.ListArray.from_arrays(pa.array(inner), pa.array(flat))
    return pa.table({"compressed_logprobs": pa.ListArray.from_arrays(pa.array(outer), positions)})


def to_bfloat16(values: AnyArray) -> npt.NDArray[np.uint16]:
    """Return the upper halves of float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> np.uint64(16) & 1)) >> np.uint64(16)).astype("<u2")


def from_bfloat16(halves: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return float32 values of ``to_bfloat16``."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _pack_ids(ids_PK: AnyArray, bits: int) -> U8Array:
    bits_PKB = (ids_PK.astype(np.int64)[..., None] >> np.arange(bits) & 1).astype(np.uint8)
    return np.packbits(bits_PKB.reshape(len(ids_PK), -1), axis=1, bitorder="little")


def _unpack_ids(packed: U8Array, bits: int, k: int) -> AnyArray:
    flat = np.unpackbits(packed, axis=1, count=k * bits, bitorder="little")
    bits_PKB = flat.reshape(len(packed), k, bits).astype(np.int64)
    return np.asarray((bits_PKB << np.arange(bits)).sum(axis=2))
