"""What listings say of an audit: its verdict, stale where the bytes are others, or none."""

import json
from pathlib import Path

import pytest

from pipeline.hub.card import audit_line, audits_in, card_of
from pipeline.state.audit_state import audit_state
from pipeline.state.audit_verdict import AUDIT, AuditVerdict, write_verdict
from schemas.storage.manifest import read_manifest
from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe, teachercache

pytestmark = pytest.mark.usefixtures("own_cache")


def verdict(dataset_id: str, outcome: str = "faithful") -> AuditVerdict:
    return AuditVerdict(
        outcome=outcome,  # type: ignore[arg-type]
        dataset_id=dataset_id,
        audited_at="2026-11-29T06:00:00+00:00",
        num_rows=12,
        num_positions=564,
        engine="transformers",
        settings={},
        measures={},
        truncation={},
        failures=[],
    )


@pytest.fixture(scope="module")
def recipe(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    made = make_recipe(tmp_path_factory.mktemp("audited"), tiny_model, paragraphs[:10])
    made.run()
    return made


def shown(recipe: TinyRecipe) -> tuple[str, dict[str, object] | None]:
    """What ``ls`` and ``status`` say, as JSON, of the signals."""
    entries = json.loads(teachercache("ls", recipe.path, "--json").out)
    (entry,) = (one for one in entries if one["group"] == "teacher_logits")
    steps = json.loads(teachercache("status", recipe.path, "--json").out)
    return entry["audit"], steps[1]["audit"]


@pytest.mark.parametrize("outcome", ["faithful", "unfaithful"])
def test_ls_and_status_show_the_verdict(recipe: TinyRecipe, outcome: str) -> None:
    folder = recipe.step("signals").folder
    (folder / AUDIT).unlink(missing_ok=True)
    assert shown(recipe) == ("-", None)
    write_verdict(folder, verdict(read_manifest(folder).dataset_id, outcome))
    whole = {"outcome": outcome, "audited_at": "2026-11-29T06:00:00+00:00", "num_rows": 12}
    assert shown(recipe) == (outcome, whole)
    assert outcome in teachercache("ls", recipe.path).out
    said = " ".join(teachercache("status", recipe.path).out.split())
    assert outcome in said
    assert teachercache("verify", folder).code == 0


def test_a_verdict_on_other_bytes_is_stale_and_a_torn_one_damaged(recipe: TinyRecipe) -> None:
    folder = recipe.step("signals").folder
    write_verdict(folder, verdict("0" * 64))
    assert shown(recipe)[0] == "stale"
    (folder / AUDIT).write_text("{")
    assert shown(recipe)[0] == "damaged"
    (folder / AUDIT).unlink()
    assert str(audit_state(folder, "0" * 64)) == "-"


def test_the_cell_has_day_and_rows(tmp_path: Path) -> None:
    write_verdict(tmp_path, verdict("1" * 64))
    assert str(audit_state(tmp_path, "1" * 64)) == "faithful, 2026-11-29, 12 rows"


def test_a_card_states_the_verdict_and_a_later_one_keeps_it(recipe: TinyRecipe) -> None:
    manifest = read_manifest(recipe.step("signals").folder)
    line = audit_line("teacher_logits/0", verdict(manifest.dataset_id))
    tables, audits = {"teacher_logits/0": manifest}, {"teacher_logits/0": line}
    card = card_of("a/b", tables, licence=None, teacher=None, audits=audits)
    assert audits_in(card) == audits
    assert "audited on 2026-11-29: 12 rows (564 positions)" in card and "faithful" in card
    assert audits_in(card_of("a/b", tables, licence=None, teacher=None)) == {}
