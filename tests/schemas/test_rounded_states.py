"""States in whole steps: what is stored gives back the nearest step, whatever its size."""

import numpy as np
import pytest

from schemas.rounded_states import BEYOND, hidden_states, in_steps, num_beyond


@pytest.mark.parametrize("scale", [0.01, 1.0, 3000.0])
def test_every_component_is_within_half_a_step(scale: float) -> None:
    rng = np.random.default_rng(0)
    hidden_PD = (scale * rng.standard_t(2, size=(40, 33))).astype(np.float32)
    hidden_PD[3, 7] = 60_000.0
    step = float(np.float32(0.013))
    codes_PD, beyond_E = in_steps(hidden_PD, step)
    assert codes_PD.dtype == np.int8 and beyond_E.dtype == np.int32
    assert num_beyond(codes_PD) == len(beyond_E) >= 1
    assert (np.abs(beyond_E) > 127).all()
    row = {"hidden_codes_PD": codes_PD, "hidden_beyond_E": beyond_E, "hidden_step": step}
    again_PD = hidden_states(row)
    assert again_PD.dtype == np.float32
    rounding = np.abs(hidden_PD) * 2.0**-22  # of the quotient, and of the product
    assert (np.abs(again_PD - hidden_PD) <= step / 2 + rounding).all()


def test_a_byte_holds_127_either_way_and_a_mark() -> None:
    codes_PD, beyond_E = in_steps(np.array([[-128.4, -127.4, 127.4, 128.0, 0.5, 1.5]]), 1.0)
    assert codes_PD.tolist() == [[BEYOND, -127, 127, BEYOND, 0, 2]]  # ties to even
    assert beyond_E.tolist() == [-128, 128]


def test_states_that_are_stored_as_they_are_come_back_so() -> None:
    hidden_PD = np.ones((2, 3), np.float16)
    found = hidden_states({"hidden_PD": hidden_PD})
    assert found.dtype == np.float16 and (found == hidden_PD).all()
