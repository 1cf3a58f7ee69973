"""What is allowed between a cache and a live teacher: what two live passes differ by, and a margin.

The control makes the same comparison between two live passes of the same teacher. Of each measure
it gives differences of many positions. Those that matter are the largest, of which more come the
more positions are compared; the excess over a high quantile is taken to be exponential (peaks over
threshold), and the bound is where at most a stated share of audits has one above it. Twice that is
allowed, as the tail of rounding in half precision may be heavier, and never less than a floor for
the dtype, which covers what a control in one engine cannot see.
"""

import math

import numpy as np
import numpy.typing as npt

F64Array = npt.NDArray[np.float64]
FALSE_ALARMS = 1e-3  # of audits of a faithful table: over all of its measures together
_TAIL = 0.1  # the share of the control's differences that the tail is judged by
_MARGIN = 2.0


def allowed(control: F64Array, num_compared: int, *, num_measures: int, floor: float) -> float:
    """Return the largest difference that ``num_compared`` values of a faithful table may have.

    ``control`` are the differences between live passes, of one measure; there may be none.
    """
    if not control.size:
        return floor
    start = float(np.quantile(control, 1.0 - _TAIL))
    excess = control[control > start] - start
    mean = float(excess.mean()) if excess.size else 0.0
    expected = _TAIL * max(num_compared, 1) * num_measures / FALSE_ALARMS
    bound = max(start + mean * math.log(max(expected, 1.0)), float(control.max()))
    return max(floor, _MARGIN * bound)
