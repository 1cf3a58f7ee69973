"""Recipes to DAGs: for each one that caches and one that trains, and one audit of them all."""

import datetime
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from airflow.sdk import (
    DAG,
    Asset,
    BaseOperator,
    CronDataIntervalTimetable,
    CronTriggerTimetable,
    DeadlineAlert,
    DeadlineReference,
    Param,
    PartitionedAssetTimetable,
    SyncCallback,
    TaskGroup,
    TriggerRule,
    Variable,
    get_current_context,
    task,
)
from airflow.sdk.exceptions import AirflowException
from teachercache_alerts import deadline_missed, task_failed
from teachercache_command import calls, extra_of, read_plan
from teachercache_recipes import Recipe, RecipeError, Schedule, Step, read_folder
from teachercache_runners import RayJobOperator, kubernetes_operator
from teachercache_tasks import (
    AuditOperator,
    ReportOperator,
    TeachercacheOperator,
    VerifyOperator,
)

MAX_RETRY_DELAY = datetime.timedelta(hours=1)
PARAMS = {
    "date": Param(
        None,
        type=["null", "string"],
        format="date",
        description="The day that ${DS} stands for; without one, the day of the run.",
    ),
    "overrides": Param(
        [],
        type="array",
        items={"type": "string", "pattern": "^[^=]+=.*$"},
        description="Values of the recipe to change: steps.signals.encoding.k=32, one a line.",
    ),
    "workers": Param(
        None,
        type=["null", "integer"],
        minimum=1,
        description="Workers that a task may use, in place of execution.workers.",
    ),
}


def recipes_folder() -> Path:
    """Return the folder of recipes: ``TEACHERCACHE_RECIPES``, else Variable teachercache_recipes.

    The variable of the environment comes first: it costs no question to the database.
    """
    named = os.environ.get("TEACHERCACHE_RECIPES")
    return Path(named or Variable.get("teachercache_recipes", default="recipes")).absolute()


def make_dags() -> tuple[list[DAG], list[str]]:
    """Return the DAGs of all good recipes, and one line for each of the others."""
    recipes, problems = read_folder(recipes_folder())
    good: list[Recipe] = []
    for recipe in recipes:
        try:
            _check(recipe)
        except RecipeError as error:
            problems.append(str(error))
        else:
            good.append(recipe)
    dags = [cache_dag(recipe) for recipe in good]
    dags += [train_dag(recipe) for recipe in good if recipe.training_steps]
    return ([*dags, audit_dag(good)] if good else []), problems


def _check(recipe: Recipe) -> None:
    """Raise RecipeError for what only Airflow can tell."""
    cron, runner = recipe.schedule.cron, recipe.schedule.runner
    if cron is not None:
        from airflow.timetables.interval import CronDataIntervalTimetable as Timetable

        try:
            Timetable(cron, timezone="UTC").validate()
        except AirflowException as error:
            raise recipe.error(
                "cron", f"is '{cron}', expected five fields as of cron: {error}"
            ) from error
    provider = "airflow.providers.cncf"
    if runner == "kubernetes" and importlib.util.find_spec(provider) is None:
        raise recipe.error(
            "runner", "is kubernetes: install apache-airflow-providers-cncf-kubernetes for it"
        )


def cache_dag(recipe: Recipe) -> DAG:
    """Make the DAG of all that makes tables: plan, each step, verify, publish the asset, report."""
    schedule = recipe.schedule
    timetable = None
    if schedule.cron is not None:  # a run is about the interval that lies behind it
        timetable = CronDataIntervalTimetable(schedule.cron, timezone="UTC")
    with DAG(
        dag_id=f"{recipe.name}__cache",
        schedule=timetable,
        catchup=schedule.catchup,
        description=f"Tables of recipe {recipe.name}",
        auto_register=False,
        **_options(recipe, f"{recipe.name}__cache"),
    ) as dag:
        path = str(recipe.path)
        plan = TeachercacheOperator(task_id="plan", recipe=path, arguments=["plan"])
        ends: dict[str, BaseOperator] = {}
        for step in recipe.cache_steps:
            first, last = _tasks(step, recipe)
            for needed in [ends[name] for name in step.needs] or [plan]:
                needed >> first
            ends[step.name] = last
        leaves = [end for end in ends.values() if not end.downstream_task_ids]
        verify = VerifyOperator(task_id="verify", recipe=path, arguments=["verify"])
        leaves >> verify >> _publish(path, _asset(recipe)) >> _report(recipe)
    return dag


def train_dag(recipe: Recipe) -> DAG:
    """Make the DAG of all steps about students: a run for each date whose tables are published.

    Airflow's queue for a plain asset holds one waiting event, and drops the dates of the others.
    A date is a partition of the asset: its run is there at once, and waits for its turn. What is
    published while a DAG is paused starts nothing, so this one is not paused to begin with.
    """
    with DAG(
        dag_id=f"{recipe.name}__train",
        schedule=PartitionedAssetTimetable(assets=_asset(recipe)),
        catchup=False,
        is_paused_upon_creation=False,
        description=f"Students of recipe {recipe.name}",
        auto_register=False,
        **_options(recipe, f"{recipe.name}__train"),
    ) as dag:
        ends: dict[str, BaseOperator] = {}
        for step in recipe.training_steps:
            ends[step.name] = _step_task(step, recipe)
            for name in step.needs:
                if name in ends:
                    ends[name] >> ends[step.name]
        [end for end in ends.values() if not end.downstream_task_ids] >> _report(recipe)
    return dag


def audit_dag(recipes: Sequence[Recipe]) -> DAG:
    """Make the DAG that looks once a week at every byte below the recipes' roots.

    Then a live teacher makes a sample of each recipe's signals again: what it finds is an event of
    the asset ``teachercache_NAME_audit``, and a table that is not its teacher's an alert.
    """
    with DAG(
        dag_id="teachercache_audit",
        schedule=CronTriggerTimetable("@weekly", timezone="UTC"),
        start_date=_midnight(Schedule().start_date),
        catchup=False,
        max_active_runs=1,
        tags=["teachercache"],
        default_args={"retries": 0, "on_failure_callback": task_failed},
        auto_register=False,
        description="Checksums of all that is finished, and signals held to their live teachers",
    ) as dag:
        for recipe in recipes:
            path = str(recipe.path)
            verify = TeachercacheOperator(task_id=recipe.name, recipe=path, arguments=["verify"])
            if any(step.runs_model for step in recipe.cache_steps):
                verify >> _audit(recipe)
    return dag


def _audit(recipe: Recipe) -> BaseOperator:
    """Make the task that runs the teacher, in the pool of the recipe's signal steps."""
    name = f"{recipe.name}_audit"
    return AuditOperator(
        task_id=name,
        recipe=str(recipe.path),
        arguments=["audit"],
        asset=Asset(name=f"teachercache_{name}", uri=f"teachercache://{recipe.name}/audit"),
        pool=recipe.schedule.pool,
        execution_timeout=_minutes(recipe.schedule.timeout_minutes),
    )


def _options(recipe: Recipe, dag_id: str) -> dict[str, Any]:
    schedule = recipe.schedule
    options: dict[str, Any] = {
        "start_date": _midnight(schedule.start_date),
        "max_active_runs": schedule.max_active_runs,
        "tags": ["teachercache", *schedule.tags],
        "params": PARAMS,
        "doc_md": _document(recipe),
        "default_args": {
            "retries": schedule.retries,
            "retry_delay": datetime.timedelta(seconds=schedule.retry_delay_s),
            "retry_exponential_backoff": 2.0,
            "max_retry_delay": MAX_RETRY_DELAY,
            "execution_timeout": _minutes(schedule.timeout_minutes),
            "on_failure_callback": task_failed,
        },
    }
    if (minutes := schedule.deadline_minutes) is not None:
        options["deadline"] = DeadlineAlert(
            reference=DeadlineReference.DAGRUN_QUEUED_AT,
            interval=datetime.timedelta(minutes=minutes),
            callback=SyncCallback(deadline_missed, kwargs={"dag_id": dag_id, "minutes": minutes}),
        )
    return options


def _tasks(step: Step, recipe: Recipe) -> tuple[BaseOperator, BaseOperator]:
    """Return a step's first and last task: a table is made by one mapped task a group of shards."""
    if step.kind != "table":
        only = _step_task(step, recipe)
        return only, only
    with TaskGroup(step.name):
        groups = _groups(str(recipe.path), step.name, recipe.schedule.runner)
        shards = _operator(recipe).partial(
            task_id="shards",
            recipe=str(recipe.path),
            arguments=["run", "--step", step.name],
            pool=recipe.schedule.pool,
            max_active_tis_per_dagrun=recipe.schedule.max_parallel_groups,
            map_index_template="shards {{ task.shards }}",
        )
        finish = _step_task(step, recipe, "finish", trigger_rule=TriggerRule.NONE_FAILED)
        shards.expand(shards=groups) >> finish
    return groups.operator, finish


def _step_task(
    step: Step, recipe: Recipe, task_id: str | None = None, **options: Any
) -> BaseOperator:
    if step.kind != "source":
        options["pool"] = recipe.schedule.pool
    return _operator(recipe)(
        task_id=task_id or step.name,
        recipe=str(recipe.path),
        arguments=["run", "--step", step.name],
        **options,
    )


def _operator(recipe: Recipe) -> Any:
    runner = recipe.schedule.runner
    if runner == "kubernetes":
        return kubernetes_operator()
    return RayJobOperator if runner == "ray" else TeachercacheOperator


@task(task_id="groups")
def _groups(path: str, step: str, runner: str) -> list[str]:
    """Return the groups of shards there are to make: none of a finished step."""
    (call,) = calls(get_current_context(), path)
    found = read_plan(call)[step]
    if found["state"] == "done":
        return []
    return [f"0:{found['num_shards']}"] if runner == "ray" else list(found["groups"])


def _report(recipe: Recipe) -> BaseOperator:
    return ReportOperator(task_id="report", recipe=str(recipe.path), arguments=["report"])


def _publish(path: str, asset: Asset) -> BaseOperator:
    @task(task_id="publish", outlets=[asset])
    def publish() -> None:
        """Tell whoever waits for the tables which they are and where: an event for their date."""
        context = get_current_context()
        (call,) = calls(context, path)
        event = context["outlet_events"][asset]
        event.extra = extra_of(call, read_plan(call))
        event.add_partitions(call.date)

    return publish().operator


def _asset(recipe: Recipe) -> Asset:
    return Asset(name=f"teachercache_{recipe.name}", uri=f"teachercache://{recipe.name}")


def _document(recipe: Recipe) -> str:
    steps = ", ".join(f"`{step.name}` ({step.kind})" for step in recipe.steps.values())
    return f"Recipe `{recipe.path}`: {steps}\n\n```yaml\n{recipe.text}\n```\n"


def _midnight(day: datetime.date) -> datetime.datetime:
    return datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC)


def _minutes(minutes: float | None) -> datetime.timedelta | None:
    return None if minutes is None else datetime.timedelta(minutes=minutes)
