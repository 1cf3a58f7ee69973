"""The experiment on distributions in its quick form: whole, and right where it must be."""

import json
from pathlib import Path

import pytest

from benchmarks.methods import distributions
from benchmarks.methods.distribution_methods import FAMILIES
from benchmarks.methods.distributions_report import CLAIMS


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    """The source is its own table's teacher, so its KL to the truth is float16's error alone."""
    asked = ["--quick", "--cache", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert distributions.main([*asked, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    (bar,) = found["bars"]
    assert bar["ok"] and 0 <= bar["value"] < 1e-3
    assert len(found["rows"]) == len(FAMILIES)
    assert all(row["KL to the truth"] > 0.01 for row in found["rows"]), "students know less"
    page = (tmp_path / "docs" / "evidence_distributions.md").read_text()
    assert sum(claim.text in page for claim in CLAIMS) == len(CLAIMS)
    assert len(page.splitlines()) <= 80
    assert (tmp_path / "docs" / "evidence_distributions.png").stat().st_size > 10_000
    results = json.loads(
        (tmp_path / "benchmarks" / "distributions-quick" / "results.json").read_text()
    )
    kl_SE = results["methods"]["exact"]["kl_SE"]
    assert len(kl_SE) == 2 and len({len(row) for row in kl_SE}) == 1
