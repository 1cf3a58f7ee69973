"""Tokens drawn with one threshold for the whole table, and their values: torch, CPU or GPU.

``threshold`` with tau. A token adds ``pi d`` to the sum of an objective, with pi a student of a
later day and d its advantage less a constant c of the position, which the row keeps: the mean
advantage over the tokens of which the student's opinion is not known. It is kept with a probability
close to ``min(1, m |d| / (tau beta))``, with m the mean distribution that ``supports`` completes.
The variance of the sum is about tau times what the tokens that are not sure add to it, so for a
mean number of tokens the error over all positions is least where tau is one for all of them. A
position where the models agree keeps a token or none, one where they part up to ``max_k``; tau is
doubled there until that is enough.

The probability is not ``m |d| / (tau beta)`` itself but ``|d|`` over the next power of two above
``tau beta / m``: then the value of a token that is drawn, d over its probability, is that power of
two, and takes no more than its exponent (``schemas.advantage_values``). Any probabilities above 0
are unbiased; these cost some percent of error. They are rounded to multiples of 2^-40, of which
float64 sums are exact: a draw does not depend on how positions and ids are cut into blocks, and a
token that is sure is never missed. All ids are drawn as one set in the order of ids, so that they
rise.

Dimensions: P = positions, V = vocabulary, K = ``max_k``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.advantage_values import FIRST_OCTAVE, LAST_OCTAVE
from schemas.distribution import round_mantissa
from stages.signals.advantages.supports import Scored, StudentTop, mean_distribution
from stages.signals.scoring.encoding import ids_at

_GRAIN = 2.0**-40  # of a probability
_LEAST_MASS = 1e-30


@dataclass(frozen=True, slots=True)
class DrawnKept:
    """Up to K tokens of each position by rising id, their values, and c.

    Where ``is_kept_PK`` is not set there is none.
    """

    token_ids_PK: Tensor
    values_PK: Tensor
    is_kept_PK: Tensor
    rest_advantages_P: Tensor


def drawn_support(
    scored: Scored, student: StudentTop, offsets_P: Tensor, *, tau: float, max_k: int
) -> DrawnKept:
    """Draw the tokens of each position; ``offsets_P`` in [0, 1) is the one uniform of the draw."""
    all_tokens = weighed(scored, student, tau=tau, max_k=max_k)
    points_PK = offsets_P.double()[:, None] + torch.arange(max_k, device=offsets_P.device)
    totals_P = all_tokens.chances_PV.sum(dim=1, dtype=torch.float64)
    ids_PK = ids_at(points_PK, all_tokens.chances_PV)
    differences_PK = all_tokens.differences_PV.gather(1, ids_PK)
    least_PK = all_tokens.octaves_PV.gather(1, ids_PK).exp2()
    return DrawnKept(
        token_ids_PK=ids_PK,
        values_PK=differences_PK.abs().maximum(least_PK).copysign(differences_PK),
        is_kept_PK=points_PK < totals_P[:, None],
        rest_advantages_P=all_tokens.rest_P,
    )


@dataclass(frozen=True, slots=True)
class Weighed:
    """Of every token d, the probability that it is kept, and the octave of its value if drawn."""

    differences_PV: Tensor
    chances_PV: Tensor
    octaves_PV: Tensor
    rest_P: Tensor


def weighed(scored: Scored, student: StudentTop, *, tau: float, max_k: int) -> Weighed:
    """Weigh all tokens of each position; probabilities sum to at most ``max_k``."""
    mean_PV, guess_PV = mean_distribution(scored, student)
    differences_PV = scored.advantages()
    rest_P = _rounded(of_rest(differences_PV, guess_PV))
    least_PV = tau * scored.beta / mean_PV.clamp_(min=_LEAST_MASS)
    return weighed_about(rest_P, differences_PV, least_PV, max_k=max_k)


def of_rest(differences_PV: Tensor, guess_PV: Tensor) -> Tensor:
    """Return the mean advantage [P] of the tokens of which the student's opinion is guessed."""
    of_rest_P: Tensor = torch.linalg.vecdot(guess_PV, differences_PV)
    return of_rest_P / guess_PV.sum(dim=1).clamp_(min=_LEAST_MASS)


def weighed_about(
    rest_P: Tensor, differences_PV: Tensor, least_PV: Tensor, *, max_k: int
) -> Weighed:
    """Weigh advantages [P, V] less the rest; what is passed is overwritten.

    ``least_PV`` is the size that is sure of being kept.
    """
    sizes_PV = differences_PV.sub_(rest_P[:, None]).abs()
    octaves_PV = least_PV.log2_().ceil_()
    octaves_PV.clamp_(min=FIRST_OCTAVE, max=LAST_OCTAVE)
    chances_PV = _chances(sizes_PV, octaves_PV)
    while bool((is_full_P := chances_PV.sum(dim=1, dtype=torch.float64) > max_k).any()):
        octaves_PV[is_full_P] += 1.0
        chances_PV[is_full_P] = _chances(sizes_PV[is_full_P], octaves_PV[is_full_P])
    return Weighed(differences_PV, chances_PV, octaves_PV, rest_P)


def _chances(sizes_PV: Tensor, octaves_PV: Tensor) -> Tensor:
    """Return ``min(1, |d| / 2^octave)``, rounded to whole multiples of the grain."""
    chances_PV = (sizes_PV / octaves_PV.exp2()).clamp_(max=1.0)
    return chances_PV.div_(_GRAIN).round_().mul_(_GRAIN)


def _rounded(values_P: Tensor) -> Tensor:
    return torch.from_numpy(round_mantissa(values_P.cpu().numpy())).to(values_P)
