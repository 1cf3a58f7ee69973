"""What the DAGs know of recipes is what the package knows: kinds, references, the schedule."""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from teachercache_recipes import RUNNERS, RecipeError, Schedule, read_recipe
from teachercache_stages import KINDS, REFERENCES

from pipeline.planning import recipe as recipes
from pipeline.planning.plan import make_plan, needs
from pipeline.planning.recipe_file import load_recipe
from schemas.errors import ConfigError
from stages.registry import AIRFLOW, STAGES, airflow_list, name_of
from tests.house.tree import REPOSITORY

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.yaml"))


def test_airflows_list_of_stages_is_the_one_that_make_stages_writes() -> None:
    assert (REPOSITORY / AIRFLOW).read_text() == airflow_list()
    assert {name_of(stage): stage.KIND for stage in STAGES} == KINDS
    assert {"input", "data", "model", "reference", "student", "judge"} < set(REFERENCES)


def test_a_schedule_has_the_same_settings_and_defaults() -> None:
    ours = recipes.Schedule()
    assert {item.name: getattr(Schedule(), item.name) for item in fields(Schedule)} == dict(ours)
    assert get_args(recipes.Schedule.model_fields["runner"].annotation) == RUNNERS


@pytest.mark.parametrize(
    "schedule",
    [
        *({"cron": 3}, {"retries": -1}, {"pool": None}, {"timeout_minutes": 0}, {"catchup": "x"}),
        *({"start_date": "soon"}, {"tags": "a"}, {"runner": "x"}, {"crn": ""}, []),
        *({"max_active_runs": 0}, {"max_parallel_groups": 0}),
    ],
)
def test_both_refuse_the_same_schedules(schedule: Any, tmp_path: Path) -> None:
    body = yaml.safe_load(EXAMPLES[0].read_text()) | {"schedule": schedule}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    with pytest.raises(RecipeError, match=r"line \d+: .*schedule"):
        read_recipe(path)
    with pytest.raises(ConfigError, match="schedule"):
        load_recipe(path)


def test_both_read_the_same_schedule(tmp_path: Path) -> None:
    schedule = "{cron: '@daily', start_date: 2026-02-03, tags: [a], retries: 0, retry_delay_s: 2.5}"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{EXAMPLES[0].read_text()}\nschedule: {schedule}\n")
    ours, theirs = load_recipe(path).schedule, read_recipe(path).schedule
    assert {item.name: getattr(theirs, item.name) for item in fields(Schedule)} == dict(ours)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_graph_is_that_of_the_plan(
    path: Path, tiny_model: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    """Every example, its models and files replaced by tiny ones that can be planned."""
    body = yaml.safe_load(path.read_text())
    for model in body["models"].values():
        if "path" in model:
            model["path"] = str(tiny_model)
            model.pop("adapter", None)
    _replace_files(body["steps"], tmp_path / "task_16_13_train.tsv", tiny_encoder)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(yaml.safe_dump(body, sort_keys=False))
    theirs = read_recipe(copy)
    plan = make_plan(load_recipe(copy))
    for step in plan:
        drawn = theirs.steps[step.name]
        assert set(drawn.needs) == {needed.name for needed in needs(plan, step)}, step.name
        assert drawn.kind == step.kind
    tables = {step.name for step in plan if step.kind in ("source", "table")}
    assert tables <= {step.name for step in theirs.cache_steps}


def _replace_files(value: Any, text: Path, encoder: Path) -> None:
    if not text.exists():
        shutil.copy(__file__, text)
    if isinstance(value, list):
        for item in value:
            _replace_files(item, text, encoder)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("paths", "files"):
                value[key] = [str(text)]
            elif key == "templates" and isinstance(item, str):
                value[key] = str(text)
            elif key == "encoder":
                value[key] = str(encoder)
            else:
                _replace_files(item, text, encoder)
