"""The experiment on preferences in its quick form: whole, and right where it must be."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.methods import preferences
from benchmarks.methods.preference_measures import wins
from benchmarks.methods.preference_steps import METHODS, START
from benchmarks.methods.preferences_report import CLAIMS
from pipeline.planning.plan import make_plan
from pipeline.planning.recipe_file import load_recipe


def test_wins_are_counted_over_all_comparisons() -> None:
    first_EN, second_EN = np.array([[1.0, 3.0], [0.0, 0.0]]), np.array([[1.0, 2.0], [1.0, 0.0]])
    assert wins(first_EN, second_EN).tolist() == [0.625, 0.25]
    assert wins(first_EN, first_EN).tolist() == [0.5, 0.5]


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    """SFT wins half against itself and is no KL away; every other student has moved."""
    asked = ["--quick", "--cache", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert preferences.main([*asked, "--json", str(tmp_path / "found.json")]) == 0
    folder = tmp_path / "benchmarks" / "preferences-quick"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["students"]) == {START, *(method.name for method in METHODS)}
    for name, measured in results["students"].items():
        wins_SE = np.array(measured["wins"])
        assert wins_SE.shape == (2, 40) and np.isfinite(measured["implicit"]).all()
        if name == START:
            assert (wins_SE == 0.5).all() and np.abs(measured["kl"]).max() < 1e-4
        else:
            assert np.abs(measured["kl"]).min() > 1e-4, name
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["rows"]) == 1 + len(METHODS)
    page = (tmp_path / "docs" / "evidence_preferences.md").read_text()
    assert sum(claim.text in page for claim in CLAIMS) == len(CLAIMS)
    assert len(page.splitlines()) <= 110
    assert (tmp_path / "docs" / "evidence_preferences.png").stat().st_size > 10_000
    plan = make_plan(load_recipe(folder / "seed-0.yaml"))
    assert all((step.folder / "checkpoint.json").is_file()
               or (step.folder / "manifest.json").is_file() for step in plan)  # fmt: skip
