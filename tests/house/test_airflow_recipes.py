"""What the DAGs know of recipes is what the package knows: kinds, references, the schedule."""

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
from tests.fixtures.example_recipes import EXAMPLES, tiny_example
from tests.house.tree import REPOSITORY


def test_airflows_list_of_stages_is_the_one_that_make_stages_writes() -> None:
    assert (REPOSITORY / AIRFLOW).read_bytes() == airflow_list().encode(), "run `make stages`"
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
    copy = tiny_example(path, tmp_path, tiny_model, tiny_encoder)
    theirs = read_recipe(copy)
    plan = make_plan(load_recipe(copy))
    for step in plan:
        drawn = theirs.steps[step.name]
        assert set(drawn.needs) == {needed.name for needed in needs(plan, step)}, step.name
        assert drawn.kind == step.kind
    tables = {step.name for step in plan if step.kind in ("source", "table")}
    assert tables <= {step.name for step in theirs.cache_steps}
