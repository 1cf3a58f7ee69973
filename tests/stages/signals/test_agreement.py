"""Differences of an audit where a plain quotient has no value."""

import numpy as np
import pytest

from pipeline.audit.diagnosis import what_differs
from stages.signals.scoring.agreement import NATS, Compared, Measure, over_length

MEASURES = {
    "states": Measure("of its length", "hidden state", NATS),
    "entropy": Measure("nats", "entropy", NATS),
}


def test_a_state_of_zeros_is_like_itself_and_unlike_others() -> None:
    live_PD = np.array([[3.0, 4.0], [0.0, 0.0]])
    assert over_length(np.zeros((2, 2)), live_PD) == pytest.approx([0.0, 0.0])
    missed_PD = np.array([[0.0, 0.5], [0.0, 0.5]])
    assert over_length(missed_PD, live_PD) == pytest.approx([0.1, 0.5 / 5e-3])
    assert over_length(np.zeros((1, 2)), np.zeros((1, 2))) == pytest.approx([0.0])
    assert over_length(np.full((1, 2), 0.5), np.zeros((1, 2)))[0] > 1e5


def test_what_is_no_number_is_named_itself() -> None:
    row = Compared(
        sample_id="a",
        places_P=np.arange(2),
        apart={"states": np.array([0.0, np.nan]), "entropy": np.array([0.0, 0.0])},
    )
    said = what_differs(row, MEASURES, {"states": 1e-3, "entropy": 1e-3})
    assert said.startswith("hidden state differs by nan of its length at position 1")
