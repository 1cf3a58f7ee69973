"""One walk over the columns of ``threshold_tau`` rows, to count, to pack and to unpack them.

Order: head counts; head codes, the first of all positions, then the second, and so on, each under
the code before it and how many are left; tail counts under what the codes leave over, which nearly
tells them; the two float16 columns under the same and the first code; head ids; tail ids as a set.

A set of m tail ids takes ``log2 m!`` bits less than a list of them. The ids lie in leaves of about
equal weight; how many of the m lie in the first half of the leaves is coded, then how many of those
in the first half of that half, and so on while there are two or more. What stands alone needs one
even symbol for the rest of the way to its leaf, and each id one for its place in the leaf.

A float16 value is coded as its 9 high bits and, evenly, as many of the others as the shard uses.

Dimensions: P = positions of a record batch, H = head entries, E = tail entries, N = nodes.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..distribution import STICK_LEVELS
from .coder import Array, Coder
from .priors import LEAF_BITS, IdOrder

FLOATS = ("entropies_P", "next_token_logprobs_P")
_LOW_BITS = 7  # of 16: 3 bits of the mantissa stay with sign and exponent
_NO_CODE = 64
_PARTS = 64  # of the mass that the head leaves over
# Bits in 1/65,536, so that sums are whole numbers: what is left after a code, and each part.
_UNIT = 1 << 16
_LEFT_BITS = np.array(
    [*np.rint(-np.log2(1.0 - STICK_LEVELS[:-1]) * _UNIT), 1 << 30], np.float64
).astype(np.int64)
_PART_BITS = np.rint(-np.log2(np.arange(_PARTS, 0, -1) / _PARTS) * _UNIT).astype(np.int64)

Columns = dict[str, Array]


def unused_bits(values: Array) -> int:
    """Return how many low bits, of the 7 that are coded evenly, are 0 in all float16 values."""
    used = int(np.bitwise_or.reduce(values.view(np.uint16), initial=1 << _LOW_BITS))
    return (used & -used).bit_length() - 1


def walk(
    coder: Coder,
    num_positions: int,
    unused: Mapping[str, int],
    given: Mapping[str, Array] | None,
    order: IdOrder,
) -> Columns:
    """Give ``given`` to the coder, or make from it, the flat columns of one record batch.

    Tail ids are ``tail_ids_E`` here, rising at each position.
    """
    told = given or {}
    heads_P = _plain(coder.alike("heads", num_positions, told.get("num_head_P")))
    starts_P = np.cumsum(heads_P) - heads_P
    codes_H = _codes(coder, heads_P, starts_P, told.get("head_codes_H"))
    has_head_P = heads_P > 0
    first_P = np.full(num_positions, _NO_CODE)
    first_P[has_head_P] = codes_H[starts_P[has_head_P]]
    bits_P = np.zeros(num_positions, np.int64)
    if len(codes_H):
        bits_P[has_head_P] = np.add.reduceat(_LEFT_BITS[codes_H], starts_P[has_head_P])
    left_P = _PARTS - np.searchsorted(_PART_BITS, bits_P, side="left")
    tails_P = _plain(coder.coded("tails", left_P.astype(np.uint8), told.get("num_tail_P")))
    made = {"num_head_P": heads_P, "num_tail_P": tails_P, "head_codes_H": codes_H}
    contexts = (left_P + 1) // 2 * 3 + first_P // 22, (left_P + 3) // 4 * 9 + first_P // 8
    for name, contexts_P in zip(FLOATS, contexts, strict=True):
        made[name] = _float16(coder, name, contexts_P, unused[name], told.get(name))
    made["head_ids_H"] = coder.alike("head_id", len(codes_H), told.get("head_ids_H"))
    made["tail_ids_E"] = _tails(coder, tails_P, told.get("tail_ids_E"), order)
    return made


def _plain(values_N: Array) -> npt.NDArray[np.int64]:
    return np.asarray(values_N, np.int64)


def _codes(coder: Coder, heads_P: Array, starts_P: Array, given_H: Array | None) -> Array:
    codes_H = np.zeros(int(heads_P.sum()), np.int64)
    going = np.flatnonzero(heads_P)
    before = np.full(len(going), _NO_CODE)
    for entry in range(int(heads_P.max(initial=0))):
        contexts = (np.minimum(heads_P[going] - entry, 3) - 1) * 33 + before // 2
        at = starts_P[going] + entry
        made = coder.coded(
            "codes", contexts.astype(np.uint8), None if given_H is None else given_H[at]
        )
        codes_H[at] = made
        goes_on = heads_P[going] > entry + 1
        going, before = going[goes_on], _plain(made)[goes_on]
    return codes_H


def _float16(
    coder: Coder, name: str, contexts_P: Array, unused: int, given_P: Array | None
) -> Array:
    bits_P = None if given_P is None else given_P.view(np.uint16).astype(np.int64)
    high_P = coder.coded(
        name, contexts_P.astype(np.uint8), None if bits_P is None else bits_P >> _LOW_BITS
    )
    num_even = _LOW_BITS - unused
    low_P = np.zeros(len(contexts_P), np.int64)
    if num_even:
        mask, sizes_P = (1 << num_even) - 1, np.full(len(contexts_P), 1 << num_even)
        low_P = _plain(coder.even(sizes_P, None if bits_P is None else bits_P >> unused & mask))
    made_P = (_plain(high_P) << _LOW_BITS) | (low_P << unused)
    halves_P: Array = made_P.astype(np.uint16).view(np.float16)
    return halves_P


def _tails(coder: Coder, tails_P: Array, given_E: Array | None, order: IdOrder) -> Array:
    """Code the tail ids of all positions: a node is a position and a part of the leaves."""
    keys_E = None  # of each entry: position, then leaf
    if given_E is not None:
        position_E = np.repeat(np.arange(len(tails_P)), tails_P)
        keys_E = (position_E << LEAF_BITS) + order.leaf[given_E]
    node_N, rest_N, num_open = _split(coder, tails_P, keys_E)
    place_N = leaf_N = None
    if keys_E is not None and given_E is not None:
        entry_N = _match(keys_E, order.place[given_E], node_N << rest_N)
        place_N, leaf_N = order.place[given_E][entry_N], keys_E[entry_N]
    sizes_N = np.left_shift(1, rest_N[:num_open], dtype=np.int32)
    way_N = coder.even(sizes_N, None if leaf_N is None else leaf_N[:num_open] & (sizes_N - 1))
    full_N = node_N << rest_N
    full_N[:num_open] |= way_N
    leaf_N = full_N & ((1 << LEAF_BITS) - 1)
    sizes_N = order.sizes_L[leaf_N]
    made_N = order.starts_L[leaf_N]
    shared = np.flatnonzero(sizes_N > 1)
    made_N[shared] += coder.even(
        sizes_N[shared], None if place_N is None else (place_N - made_N)[shared]
    )
    id_bits = len(order.ids).bit_length()
    dtype = np.int32 if len(tails_P) << id_bits <= 1 << 31 else np.int64
    keys_N: Array = (full_N >> LEAF_BITS).astype(dtype)
    keys_N <<= id_bits
    keys_N |= order.ids[made_N]
    keys_N.sort()
    return keys_N & ((1 << id_bits) - 1)


def _split(coder: Coder, tails_P: Array, keys_E: Array | None) -> tuple[Array, Array, int]:
    """Halve nodes of two or more entries down to leaves.

    Returns the node of each entry, how many halvings it is above its leaf, and how many, which come
    first, are above it at all.
    """
    nodes, rest = [], []
    at = np.flatnonzero(tails_P)
    node_N, count_N = at.astype(np.int32), tails_P[at].astype(np.uint8)
    for depth in range(LEAF_BITS):
        nodes.append(node_N[np.flatnonzero(count_N == 1)])
        rest.append(LEAF_BITS - depth)
        shared = np.flatnonzero(count_N > 1)
        node_N, count_N = 2 * node_N[shared], count_N[shared]
        given_N = None
        if keys_E is not None:
            finer_E = keys_E >> (LEAF_BITS - depth - 1)
            given_N = np.bincount(finer_E, minlength=len(tails_P) << (depth + 1))[node_N]
        first_N = coder.coded(f"split_{depth}", count_N, given_N).astype(np.uint8)
        count_N = np.concatenate([first_N, count_N - first_N])
        node_N = np.concatenate([node_N, node_N + 1])
    nodes.append(np.repeat(node_N, count_N))
    rest.append(0)
    sizes = [*map(len, nodes)]
    return np.concatenate(nodes), np.repeat(np.array(rest, np.int32), sizes), sum(sizes[:-1])


def _match(keys_E: Array, place_E: Array, first_N: Array) -> Array:
    """Return the entry of each node, whose first leaf is ``first_N``: of equal ones in order."""
    by_key_E = np.lexsort((place_E, keys_E))
    begins_N = np.searchsorted(keys_E[by_key_E], first_N)
    is_same_N = np.concatenate([[False], begins_N[1:] == begins_N[:-1]])
    place_N = np.arange(len(first_N))
    run_N = np.maximum.accumulate(np.where(is_same_N, 0, place_N))
    return by_key_E[begins_N + place_N - run_N]  # type: ignore[no-any-return]
