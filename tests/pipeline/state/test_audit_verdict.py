"""The verdict beside a table: kept, tied to its bytes, refused when damaged."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.state.audit_verdict import AUDIT, AuditVerdict, verdict_of, write_verdict
from schemas.errors import StoreError

VERDICT = AuditVerdict(
    outcome="faithful",
    dataset_id="a" * 64,
    audited_at="2026-01-02T03:04:05Z",
    num_rows=3,
    num_positions=40,
    engine="transformers",
    settings={"seed": 0},
    measures={"entropy": {"found": 1e-6, "allowed": 1e-4}},
    truncation={"kl": 0.01},
    failures=[],
)


def test_a_verdict_is_read_as_it_was_written_and_replaced_by_the_next(tmp_path: Path) -> None:
    assert verdict_of(tmp_path, VERDICT.dataset_id) is None
    write_verdict(tmp_path, VERDICT)
    assert verdict_of(tmp_path, VERDICT.dataset_id) == VERDICT
    later = replace(VERDICT, outcome="unfaithful", failures=["row 3: entropy"])
    write_verdict(tmp_path, later)
    assert verdict_of(tmp_path, VERDICT.dataset_id) == later


def test_a_verdict_on_other_bytes_is_none(tmp_path: Path) -> None:
    write_verdict(tmp_path, VERDICT)
    assert verdict_of(tmp_path, "b" * 64) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"outcome": "faithful"}'])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / AUDIT).write_text(text)
    with pytest.raises(StoreError, match=r"audit\.json is damaged .*: delete it and audit"):
        verdict_of(tmp_path, VERDICT.dataset_id)
