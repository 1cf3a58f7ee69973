"""Where the verdict of an audit is shown: ``ls`` and ``status``, for people and as JSON."""

import json
from dataclasses import replace

from pipeline.state.audit_verdict import AUDIT, AuditVerdict, write_verdict
from schemas.storage.manifest import read_manifest
from tests.fixtures.tiny_recipe import TinyRecipe, teachercache


def verdict_on(recipe: TinyRecipe, step: str) -> AuditVerdict:
    return AuditVerdict(
        outcome="faithful",
        dataset_id=read_manifest(recipe.step(step).folder).dataset_id,
        audited_at="2026-01-02T03:04:05Z",
        num_rows=1234,
        num_positions=40,
        engine="vllm",
        settings={},
        measures={},
        truncation={},
        failures=[],
    )


def shown(recipe: TinyRecipe) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """Return what ``ls`` and ``status`` say of each table, by the name of its step."""
    names = {str(step.place): step.name for step in recipe.plan()}
    entries = json.loads(teachercache("ls", recipe.root, "--json").out)
    steps = json.loads(teachercache("status", recipe.path, "--json").out)
    return (
        {names[entry["folder"]]: entry["audit"] for entry in entries},
        {step["name"]: step["audit"] for step in steps},
    )


def test_a_verdict_is_shown_with_its_table_and_only_while_its_bytes_are_there(
    copied: TinyRecipe,
) -> None:
    in_ls, in_status = shown(copied)
    assert set(in_ls.values()) == {None}
    # Text, students and results have nothing that a teacher could say again.
    assert {name for name, audit in in_status.items() if audit == "none"} == {"signals", "states"}
    folder, verdict = copied.step("signals").folder, verdict_on(copied, "signals")
    for kept, expected in (
        (verdict, "faithful"),
        (replace(verdict, outcome="unfaithful"), "unfaithful"),
        (replace(verdict, dataset_id="0" * 64), "stale"),
    ):
        write_verdict(folder, kept)
        in_ls, in_status = shown(copied)
        assert in_ls["signals"] == in_status["signals"] == expected
        assert in_ls["states"] is None and in_status["states"] == "none"
    (folder / AUDIT).write_text("{")
    in_ls, in_status = shown(copied)
    assert in_ls["signals"] == in_status["signals"] == "damaged"


def test_status_says_when_and_on_how_much(copied: TinyRecipe) -> None:
    write_verdict(copied.step("signals").folder, verdict_on(copied, "signals"))
    said = teachercache("status", copied.path)
    expected = (
        "signals: faithful, audited 2026-01-02T03:04:05Z on 1,234 rows and 40 positions, live "
        "teacher in vllm"
    )
    assert said.code == 0 and expected in said.out
    assert "faithful" in teachercache("ls", copied.root).out
