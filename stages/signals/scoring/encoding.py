"""Encode full-vocabulary logits as rows of ``teacher_logits``: torch, batched, CPU or GPU.

What each encoding keeps, and why ``threshold`` is unbiased, is in ``schemas.distribution``; this
file is the half that sees all V logits. No step loops over positions.

Cost: one exponential and four light passes over [P, V]. The vocabulary is seen in pieces of up to
64 ids, of which the largest and the sum are found once: the K largest tokens lie in the K pieces
with the largest maxima, a running sum is needed over pieces and inside the few that are drawn from,
and where entries are taken out the sums of their pieces alone are made again. On a CPU a pass costs
several times as much once [P, V] has left the cache, so positions are taken ``cache_slices`` at a
time: whole sequences, a top-k and a running sum over all V took 0.7 ms of processor time a position
of SmolLM2-135M on one core, these passes less than 0.2 ms (November 2026).

The tail is sampled in token id order. Ids of a byte-pair vocabulary rise with rarity, so a
systematic sample in that order is stratified by frequency: on 600 positions of SmolLM2-135M
against a distilled student its cross-entropy error was 0.125 nats, against 0.155 in order of
probability and 0.197 in random order (November 2026).

Dimensions: P = positions, V = vocabulary, K = kept entries, N = pieces of B ids each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

MAX_BLOCK_BYTES = 256 << 20  # no [P, V] float32 block is larger; part of what fixes the last bits
_CACHE_BYTES = 8 << 20  # 42 positions of 49,152 logits
_PIECE = 64
_NEARLY_ONE = (
    1.0 - 1e-5
)  # p this close below tau joins the head, so a tail entry is never drawn twice
_LEAST_LOGIT = -200.0  # below the largest: e^-200 is 0 in float32
_SLACK = 1e-6  # of a number of entries, which rounding alone may lift above a whole one


def cache_slices(logits_PV: Tensor) -> Iterator[slice]:
    """Cut positions into runs whose logits stay in a CPU's cache; a GPU takes them all at once."""
    num_positions, vocab_size = logits_PV.shape
    size = num_positions if logits_PV.is_cuda else max(1, _CACHE_BYTES // (4 * vocab_size))
    for start in range(0, num_positions, size):
        yield slice(start, min(start + size, num_positions))


@dataclass(frozen=True, slots=True)
class Measured:
    """Unnormalised probabilities and what every row of the table carries about them.

    Of each piece of the vocabulary, the largest and the sum of ``exp_PV``.
    """

    exp_PV: Tensor
    largest_PN: Tensor
    sums_PN: Tensor
    total_P: Tensor
    next_token_logprobs_P: Tensor
    entropies_P: Tensor

    @property
    def finite(self) -> bool:
        """Whether every position has a distribution at all."""
        return bool(torch.isfinite(self.total_P).all() & torch.isfinite(self.entropies_P).all())


def measure(logits_PV: Tensor, next_token_ids_P: Tensor) -> Measured:
    """Exponentiate logits once; ``logits_PV`` (float32) is overwritten.

    Logits of -inf are probability zero. The entropy is log Z - sum p z.
    """
    largest_PN = _pieces(logits_PV).amax(dim=-1)
    max_P1 = largest_PN.amax(dim=-1, keepdim=True)
    logits_PV.sub_(max_P1)
    next_logits_P = logits_PV.gather(1, next_token_ids_P[:, None])[:, 0].clamp_(min=_LEAST_LOGIT)
    exp_PV = logits_PV.exp()
    sums_PN = _pieces(exp_PV).sum(dim=-1)
    total_P = sums_PN.sum(dim=-1, dtype=torch.float64).float()
    mean_logit_P = logits_PV.mul_(exp_PV).sum(dim=-1)
    if not torch.isfinite(mean_logit_P).all():  # 0 * -inf; a NaN of exp_PV is in the total, too
        mean_logit_P = logits_PV.nan_to_num_(nan=0.0).sum(dim=-1)
    log_total_P = total_P.log()
    return Measured(
        exp_PV=exp_PV,
        largest_PN=(largest_PN - max_P1).exp(),
        sums_PN=sums_PN,
        total_P=total_P,
        next_token_logprobs_P=next_logits_P - log_total_P,
        entropies_P=(log_total_P - mean_logit_P / total_P).clamp_(min=0.0),
    )


@dataclass(frozen=True, slots=True)
class ThresholdSample:
    """``num_entries_P`` token ids a position, head first; ``fractions_PK`` is f_i of each entry.

    Where a position has fewer than K, the others are any ids, with fraction 0.
    """

    token_ids_PK: Tensor
    num_entries_P: Tensor
    num_head_P: Tensor
    fractions_PK: Tensor


def threshold_sample(
    measured: Measured, offsets_P: Tensor, *, k: int, tau: float | None = None
) -> ThresholdSample:
    """Draw ``k`` entries of each distribution; ``measured.exp_PV`` is overwritten.

    With ``tau`` a position has the fewest entries, at most ``k``, whose own threshold is at most
    ``tau``. ``offsets_P`` in [0, 1) is the one uniform of the systematic sample. With h head
    entries of k, tau_h = (mass outside the head) / (k - h); the head is complete at the first h
    whose next largest p is below tau_h. Masses are summed from the small end in float64, so a
    position of probability 1 - 1e-7 keeps its true remainder.
    """
    exp_PV = measured.exp_PV
    top_PK, ids_PK = _largest(exp_PV, measured.largest_PN, k)
    exp_PV.scatter_(1, ids_PK, 0.0)
    beyond_P = _summed_again(exp_PV, measured.sums_PN, ids_PK).sum(dim=-1, dtype=torch.float64)
    entry_K = torch.arange(k, device=exp_PV.device)
    left_PK = beyond_P[:, None] + top_PK.double().flip(1).cumsum(1).flip(1)
    num_entries_P = torch.full_like(ids_PK[:, 0], k)
    if tau is not None:
        num_entries_P = num_entries(top_PK, left_PK, beyond_P, tau)
    in_head_PK = in_head(top_PK, left_PK, num_entries_P)
    num_head_P = in_head_PK.sum(1)
    exp_PV.scatter_(1, ids_PK, torch.where(in_head_PK, 0.0, top_PK))
    sums_PN = _summed_again(exp_PV, measured.sums_PN, ids_PK)
    tail_ids_PK = _systematic(exp_PV, sums_PN, num_entries_P - num_head_P, offsets_P, k)
    slot_PK = (entry_K - num_head_P[:, None]).clamp(min=0)
    fractions_PK = torch.where(left_PK > 0, top_PK / left_PK, 0.0)
    if tau is not None:  # nothing is left for a tail of no entries
        fractions_PK.masked_fill_(entry_K == num_entries_P[:, None] - 1, 1.0)
    return ThresholdSample(
        token_ids_PK=torch.where(in_head_PK, ids_PK, tail_ids_PK.gather(1, slot_PK)),
        num_entries_P=num_entries_P,
        num_head_P=num_head_P,
        fractions_PK=torch.where(in_head_PK, fractions_PK, 0.0),
    )


def num_entries(top_PK: Tensor, left_PK: Tensor, beyond_P: Tensor, tau: float) -> Tensor:
    """Return the smallest k of each position whose threshold is at most ``tau``, at most K.

    ``top_PK`` are the largest masses, by falling value, ``left_PK`` (float64) what each of them and
    all smaller ones sum to, ``beyond_P`` (float64) what those outside the K do. The threshold of k
    falls as k grows, and k entries have ``tau`` itself where ``k = h + r / tau`` with h the tokens
    of at least ``tau`` and r the mass of all others.
    """
    share_P1 = tau * left_PK[:, :1]
    num_sure_P = (top_PK >= share_P1 * _NEARLY_ONE).sum(1)
    outside_PK = functional.pad(left_PK, (0, 1))
    outside_PK[:, -1] = beyond_P
    rest_P = outside_PK.gather(1, num_sure_P[:, None])[:, 0]
    num_drawn_P = (rest_P / share_P1[:, 0] - _SLACK).ceil().long().clamp(min=0)
    return (num_sure_P + num_drawn_P).clamp(min=1, max=top_PK.shape[1])


def in_head(top_PK: Tensor, left_PK: Tensor, num_entries_P: Tensor) -> Tensor:
    """Return which of the largest masses [P, K] are kept exactly, of so many entries."""
    spare_PK = num_entries_P[:, None] - torch.arange(top_PK.shape[1], device=top_PK.device)
    tau_PK = left_PK / spare_PK.clamp(min=1)
    is_large_PK = (top_PK >= tau_PK * _NEARLY_ONE) & (spare_PK > 0)
    return is_large_PK.cumprod(1).bool()


def _systematic(
    mass_PV: Tensor, sums_PN: Tensor, num_drawn_P: Tensor, offsets_P: Tensor, k: int
) -> Tensor:
    """Return [P, k] ids whose first ``num_drawn_P`` are one draw each per equal share of mass.

    A point of the running mass is found by its piece, then by its place inside the piece.
    """
    mass_PNB = _pieces(mass_PV)
    running_PN = sums_PN.double().cumsum(dim=-1)
    share_P1 = running_PN[:, -1:] / num_drawn_P[:, None].clamp(min=1)
    points_PK = (offsets_P[:, None] + torch.arange(k, device=mass_PV.device)) * share_P1
    return _found_at(points_PK, mass_PNB, running_PN)


def ids_at(points_PK: Tensor, mass_PV: Tensor) -> Tensor:
    """Return the ids [P, K] in whose share of the running mass the points lie.

    Sums are float64: of masses that are whole multiples of one number they are exact.
    """
    mass_PNB = _pieces(mass_PV)
    running_PN = mass_PNB.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    return _found_at(points_PK, mass_PNB, running_PN)


def _found_at(points_PK: Tensor, mass_PNB: Tensor, running_PN: Tensor) -> Tensor:
    pieces_PK = _first_above(running_PN, points_PK)
    before_PK = functional.pad(running_PN, (1, 0)).gather(1, pieces_PK)
    drawn_PKB = mass_PNB.gather(1, pieces_PK[:, :, None].expand(-1, -1, mass_PNB.shape[2]))
    running_PKB = drawn_PKB.double().cumsum(dim=-1)
    places_PK = _first_above(running_PKB, (points_PK - before_PK)[:, :, None])[:, :, 0]
    return pieces_PK * mass_PNB.shape[2] + places_PK


def _first_above(running: Tensor, points: Tensor) -> Tensor:
    """Return where a running sum (last dimension) first exceeds each point, inside its last mass.

    Such an entry has mass of its own; where there is no mass at all, the last entry is returned.
    """
    last = torch.nextafter(running[..., -1:], torch.zeros_like(running[..., -1:]))
    found = torch.searchsorted(running, torch.minimum(points, last), right=True)
    return found.clamp_(max=running.shape[-1] - 1)


def _largest(values_PV: Tensor, largest_PN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest values of each position, by falling value, and their ids."""
    values_PNB = _pieces(values_PV)
    num_pieces, size = values_PNB.shape[1:]
    if num_pieces <= 2 * k:
        found = values_PV.topk(k, dim=-1)
        return found.values, found.indices
    pieces_PK = largest_PN.topk(k, dim=-1).indices
    among_PKB = values_PNB.gather(1, pieces_PK[:, :, None].expand(-1, -1, size))
    largest_PK, places_PK = among_PKB.flatten(1).topk(k, dim=-1)
    ids_PK = pieces_PK.gather(1, places_PK // size) * size + places_PK % size
    return largest_PK, ids_PK


def _summed_again(values_PV: Tensor, sums_PN: Tensor, ids_PK: Tensor) -> Tensor:
    """Return the sums of pieces after the values at ``ids_PK`` have changed."""
    values_PNB = _pieces(values_PV)
    pieces_PK = ids_PK // values_PNB.shape[2]
    changed_PKB = values_PNB.gather(1, pieces_PK[:, :, None].expand(-1, -1, values_PNB.shape[2]))
    return sums_PN.scatter(1, pieces_PK, changed_PKB.sum(dim=-1))


def _pieces(values_PV: Tensor) -> Tensor:
    """View the vocabulary as [N, B]; one piece where its size has no divisor from 8 to 64."""
    vocab_size = values_PV.shape[1]
    size = next((b for b in range(_PIECE, 7, -1) if vocab_size % b == 0), vocab_size)
    return values_PV.view(len(values_PV), -1, size)


@dataclass(frozen=True, slots=True)
class TopK:
    """The K largest log-probs a position, by falling value, and the log of the mass of the rest."""

    token_ids_PK: Tensor
    logprobs_PK: Tensor
    rest_logprobs_P: Tensor


def top_k(measured: Measured, *, k: int) -> TopK:
    """Keep the ``k`` largest; ``measured.exp_PV`` is overwritten.

    The rest is summed from the entries themselves: one minus the kept mass would lose it to
    rounding (a peer's residual goes negative that way).
    """
    top_PK, ids_PK = _largest(measured.exp_PV, measured.largest_PN, k)
    measured.exp_PV.scatter_(1, ids_PK, 0.0)
    rest_P = _summed_again(measured.exp_PV, measured.sums_PN, ids_PK).sum(dim=-1)
    log_total_P = measured.total_P.log()
    return TopK(
        token_ids_PK=ids_PK,
        logprobs_PK=top_PK.log() - log_total_P[:, None],
        rest_logprobs_P=rest_P.log() - log_total_P,
    )
