"""Draws made again: 0 for the draw itself, at most the distance of distributions for another."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from schemas.advantage_values import LEVEL_SIZES
from schemas.distribution import STICK_LEVELS, quantise_sticks, round_mantissa, uniforms
from stages.signals.scoring.agreement import (
    beyond_float16,
    beyond_levels,
    beyond_mantissa,
)
from stages.signals.scoring.encoding import measure
from stages.signals.scoring.possible_draw import Entries, draw_apart
from stages.signals.scoring.states import Asked
from stages.signals.teacher_logits.encoder import RowEncoder
from stages.signals.teacher_logits.stage import TeacherLogitsStage

V, P = 307, 400
RULES: dict[str, dict[str, Any]] = {
    "k": {"k": 8},
    "tau": {"tau": 0.05},
    "tau, cut": {"tau": 0.01, "max_k": 12},
}


def distributions(rng: np.random.Generator, noise: float = 0.0) -> npt.NDArray[np.float32]:
    """Logits [P, V] from flat to sure, with some noise that is drawn apart."""
    logits_PV = np.random.default_rng(5).normal(size=(P, V)) * np.linspace(0.2, 8.0, P)[:, None]
    return (logits_PV + noise * rng.normal(size=(P, V))).astype(np.float32)


def probs_of(logits_PV: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    exp_PV = np.exp(logits_PV.astype(np.float64) - logits_PV.max(axis=1, keepdims=True))
    return np.asarray(exp_PV / exp_PV.sum(axis=1, keepdims=True))


def drawn(logits_PV: npt.NDArray[Any], rule: dict[str, Any]) -> tuple[Any, Any]:
    """The row that the stage stores of these logits, and its encoder."""
    encoding = {"kind": "threshold", **rule}
    stage = TeacherLogitsStage.model_validate(
        {"stage": "teacher_logits", "input": "x", "model": "m", "encoding": encoding}
    )
    asked = Asked("a" * 24, 1, np.zeros(P, np.int64))
    encoder = RowEncoder(stage, asked, V)
    measured = measure(torch.from_numpy(logits_PV.copy()), torch.from_numpy(asked.targets_P))
    encoder.add(measured, torch.zeros(P, 1), 0)
    return encoder.row(), encoder


def apart_from(row: Any, encoder: Any, logits_PV: npt.NDArray[Any]) -> dict[str, Any]:
    columns = {name: getattr(row, name) for name in row.__slots__}
    tau = encoder.encoding.tau
    entries = Entries.of(columns)
    return draw_apart(entries, probs_of(logits_PV), encoder.uniforms_PN, tau=tau, most=encoder.most)


@pytest.mark.parametrize("rule", RULES)
def test_a_draw_is_a_possible_draw_of_its_own_distribution(rule: str) -> None:
    logits_PV = distributions(np.random.default_rng(0))
    found = apart_from(*drawn(logits_PV, RULES[rule]), logits_PV)
    assert found["head"].shape == found["tail"].shape == (P,)
    assert max(found["head"].max(), found["tail"].max()) < 2e-6


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("rule", RULES)
def test_it_is_apart_by_no_more_than_the_distributions_are(rule: str, noise: float) -> None:
    """The bound that the control's distance is compared by; and what is far is found to be."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        logits_PV, others_PV = distributions(rng), distributions(rng, noise)
        found = apart_from(*drawn(others_PV, RULES[rule]), logits_PV)
        distance_P = np.abs(probs_of(logits_PV) - probs_of(others_PV)).sum(axis=1)
        worst_P = np.maximum(found["head"], found["tail"])
        assert (worst_P <= distance_P + 2e-6).all()
        if noise > 1e-3:  # of less, few draws come out otherwise
            assert (worst_P > distance_P / 20).mean() > 0.1


def one_wrong(row: Any, rule: str) -> Iterator[Any]:
    """The columns of a row with one thing changed at position 200."""
    columns = {name: np.array(getattr(row, name)) for name in row.__slots__ if name[-2:] != "id"}
    codes = "head_codes_E" if rule == "k" else "head_codes_H"
    at = int(columns["num_head_P"][:200].sum())
    changed = columns[codes].copy()
    changed[at] = (int(changed[at]) + 30) % 64
    yield columns | {codes: changed}
    if rule == "k":
        ids_PK = columns["token_ids_PK"].copy()
        ids_PK[200, -1] = np.setdiff1d(np.arange(V), ids_PK[200])[-1]
        yield columns | {"token_ids_PK": ids_PK}
    else:
        low_E = columns["tail_gaps_low_E"].copy()
        low_E[int(columns["num_tail_P"][:200].sum())] += 9
        yield columns | {"tail_gaps_low_E": low_E}


@pytest.mark.parametrize("rule", RULES)
def test_one_changed_entry_is_seen_at_its_position_alone(rule: str) -> None:
    logits_PV = distributions(np.random.default_rng(0))
    row, encoder = drawn(logits_PV, RULES[rule])
    for columns in one_wrong(row, rule):
        found = draw_apart(
            Entries.of(columns),
            probs_of(logits_PV),
            encoder.uniforms_PN,
            tau=encoder.encoding.tau,
            most=encoder.most,
        )
        worst_P = np.maximum(found["head"], found["tail"])
        assert worst_P[200] > 1e-3
        assert np.delete(worst_P, 200).max() < 2e-6


def test_of_a_uniform_and_a_code_the_fraction_is_known_to_a_step() -> None:
    """A fraction is 0 apart from its own code, and a step away it is not."""
    fractions = np.linspace(0.0, 1.0, 5001)
    numbers = uniforms(3, 5001, 1)[:, 0]
    codes = quantise_sticks(fractions, numbers)
    assert beyond_levels(STICK_LEVELS, codes, numbers, fractions).max() < 1e-12
    step = np.diff(STICK_LEVELS).max() * 1.01
    further = beyond_levels(STICK_LEVELS, codes, numbers, np.minimum(fractions + step, 1.0))
    assert (further[fractions + step < 1] > 0).all()
    sizes = np.geomspace(LEVEL_SIZES[0], LEVEL_SIZES[-1], 99)
    down = np.searchsorted(LEVEL_SIZES, sizes, side="right") - 1  # always, by a uniform of 1
    assert beyond_levels(LEVEL_SIZES, down, np.ones(99), sizes).max() == 0


def test_what_storage_rounds_is_no_difference() -> None:
    values = np.random.default_rng(0).normal(size=20000) * 6
    assert beyond_float16(values.astype(np.float16), values).max() == 0
    assert beyond_float16(values.astype(np.float16), values + 0.01).max() > 0.009
    assert beyond_mantissa(round_mantissa(values), values).max() == 0
    assert beyond_mantissa(round_mantissa(values), values + 0.1).max() > 0.09
