"""Hidden states in steps: the KL they cost is the one that is said, and no more than allowed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from schemas.storage.manifest import read_manifest
from schemas.tables.teacher_logits import EXACT, EXACT_INT8, RoundedLogits
from stages.models.causal_lm.language_head import LanguageHead
from stages.signals.teacher_logits.rounding import MEASURED, step_within
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from tests.fixtures.tiny_recipe import TinyRecipe, edit_recipe, make_recipe, teachercache
from tests.fixtures.tiny_teacher import Teacher, real_documents, shard_of

pytestmark = pytest.mark.usefixtures("own_cache")


def stage_of(**encoding: Any) -> TeacherLogitsStage:
    body = {"stage": "teacher_logits", "input": "documents", "model": "m"}
    return TeacherLogitsStage.model_validate({**body, "encoding": {"kind": "exact", **encoding}})


@pytest.mark.parametrize("mean_kl", [1e-4, 3e-3])
def test_the_kl_of_a_row_is_what_transformers_says(
    mean_kl: float, tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    """Against a whole forward in float64 and the stored head; rows have fewer than 40 positions."""
    teacher = Teacher(tiny_model, 512, real_documents(tiny_model, paragraphs), [], [])
    with stage_of(mean_kl=mean_kl).open(teacher.context(tmp_path)) as work:
        rows = list(work(shard_of(teacher.documents, 512)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    head = LanguageHead.load(tmp_path, device="cpu")
    for document, row in zip(teacher.documents, rows, strict=True):
        assert isinstance(row, RoundedLogits)
        ids_1T = torch.from_numpy(document.input_ids_T.astype(np.int64))[None]
        with torch.no_grad():
            live_PV = model(ids_1T).logits[0, :-1].log_softmax(-1)
        stored_PV = head.logits(torch.from_numpy(row.hidden_PD)).double().log_softmax(-1)
        kl_P = (live_PV.exp() * (live_PV - stored_PV)).sum(-1)
        places = np.linspace(0, len(kl_P) - 1, min(len(kl_P), MEASURED)).astype(int)
        assert row.rounding_kl == pytest.approx(float(kl_P[places].mean()), rel=2e-2)
        assert 0.3 * mean_kl < row.rounding_kl <= mean_kl


@pytest.mark.parametrize(
    "kl_of",
    [
        lambda step: 40.0 * step**2,
        lambda step: 1e-9 * step**2,  # so sure that any step will do
        lambda step: 0.3 * step**0.5,  # far from the law
        lambda step: 0.0 if step < 1e-3 else 1.0,
    ],
)
def test_no_step_costs_more_than_is_allowed(kl_of: Callable[[float], float]) -> None:
    step, kl = step_within(kl_of, 2.0, 1e-4)
    assert kl == kl_of(step) <= 1e-4
    assert 0.0 < step <= 2.0 and step == float(np.float32(step))


def test_steps_follow_the_square_root_of_what_is_allowed() -> None:
    found = [step_within(lambda step: 40.0 * step**2, 2.0, kl) for kl in (1e-5, 1e-4, 1e-3)]
    for (step, kl), allowed in zip(found, (1e-5, 1e-4, 1e-3), strict=True):
        assert 0.9 * allowed <= kl <= allowed
        assert step == pytest.approx((kl / 40.0) ** 0.5, rel=1e-5)


def test_states_that_are_all_zero_have_a_step() -> None:
    assert step_within(lambda step: 0.0, 0.0, 1e-4) == (1.0, 0.0)


def test_tables_without_it_keep_their_names() -> None:
    plain, asked = stage_of(), stage_of(mean_kl=1e-4)
    assert plain.hashed()["config"]["encoding"] == {"kind": "exact"}
    assert asked.hashed()["config"]["encoding"] == {"kind": "exact", "mean_kl": 1e-4}
    assert (plain.table, asked.table) == (EXACT, EXACT_INT8)
    assert asked.side_files == plain.side_files != ()


@pytest.mark.parametrize("mean_kl", [0.0, 1e-7, 1.0, "x"])
def test_a_kl_out_of_reach_is_refused(mean_kl: Any) -> None:
    with pytest.raises(ValidationError) as error:
        stage_of(mean_kl=mean_kl)
    (problem,) = error.value.errors()
    assert problem["loc"][-1] == "mean_kl"


@pytest.fixture(scope="module")
def made(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    recipe = make_recipe(tmp_path_factory.mktemp("made"), tiny_model, paragraphs[:6])
    encoding = {"kind": "exact", "mean_kl": 1e-4}
    edit_recipe(recipe, "steps", "signals", "encoding", value=encoding)
    recipe.run()
    return recipe


def test_what_it_cost_is_said_of_the_table_and_of_a_row(made: TinyRecipe) -> None:
    folder = made.step("signals").folder
    assert read_manifest(folder).variant == "exact_int8"
    for words in (("status", made.path), ("inspect", folder, "--rows", "1")):
        said = teachercache(*words)
        assert said.code == 0 and "states rounded at a KL of " in said.out, said.out + said.err
    assert "nats of KL from the teacher unrounded" in said.out
    assert teachercache("verify", made.step("documents").folder, folder).code == 0


def test_an_audit_finds_the_table_faithful(made: TinyRecipe) -> None:
    said = teachercache("audit", made.path, "--step", "signals", "--engine", "transformers")
    assert said.code == 0, said.out + said.err
