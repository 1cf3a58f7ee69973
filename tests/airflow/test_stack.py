"""A whole Airflow on loopback: scheduled runs, killed tasks, time-outs, assets, backfills."""

import json
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import World, tables
from running_airflow import WITHIN_S, Stack, Webhook, wait_for

RETRY = {"retries": 6, "retry_delay_s": 2}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roots")


@pytest.fixture(scope="module")
def stack(world: World, roots: Path) -> Iterator[Stack]:
    """A running Airflow with four recipes of which one cannot be read and one trains.

    Its DAG that trains waits for tables; all others are paused.
    """
    recipes = roots / "recipes"
    today = datetime.now(UTC)
    for day in (today, today - timedelta(days=1)):
        texts = world.folder / "text"
        shutil.copy(texts / "long.jsonl", texts / f"{day:%Y-%m-%d}.jsonl")

    def add(name: str, steps: dict[str, Any] = world.table_steps, **schedule: Any) -> None:
        path = recipes / f"{name}.yaml"
        changes = {"name": name, "steps": steps, "schedule": {**RETRY, **schedule}}
        world.write(path, roots / name, **changes)

    add("nightly", world.body["steps"], cron="@daily", start_date=datetime(2026, 1, 5).date())
    began = time.monotonic()
    world.plain_run(f"{today:%Y-%m-%d}")
    plain_s = time.monotonic() - began  # of which a try does a part, on this machine just now
    add("timed", timeout_minutes=max(0.5, 2 * plain_s / 60), deadline_minutes=0.05)
    add("twice", max_active_runs=2)
    (recipes / "broken.yaml").write_text("name: broken\nsteps:\n  a: [\n")
    running = Stack(recipes, Webhook())
    try:
        running.wait_until_healthy()
        yield running
    finally:
        running.stop()


def commands(root: Path, word: str) -> list[psutil.Process]:
    """The teachercache processes that work below a root and were given this word."""
    recipe = f"/{root.name}.yaml"
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if word in words and any(part.endswith(recipe) for part in words):
            found.append(process)
    return found


def wait_for_command(root: Path, word: str) -> psutil.Process:
    """Wait until a command with this word works below a root."""
    deadline = time.monotonic() + WITHIN_S
    while not (found := commands(root, word)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found[0]


def finished_shards(root: Path) -> dict[Path, int]:
    found = (root / "teacher_logits").glob("*/shard-*.json")
    return {path: path.with_suffix(".arrow").stat().st_mtime_ns for path in found}


def wait_for_first_shards(root: Path) -> psutil.Process:
    """Wait until a mapped task has finished a shard; return its command, stopped."""
    deadline = time.monotonic() + WITHIN_S
    while not (found := finished_shards(root)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    number = int(next(iter(found)).name.split("-")[1])
    for command in commands(root, "--shards"):
        words = command.cmdline()
        first, end = words[words.index("--shards") + 1].split(":")
        if int(first) <= number < int(end):
            command.suspend()
            return command
    raise AssertionError("the command has ended already")


def test_a_recipe_that_cannot_be_read_is_shown_and_the_others_are_there(stack: Stack) -> None:
    names = {"nightly__cache", "nightly__train", "timed__cache", "twice__cache"}
    wait_for(lambda: set(stack.dags()) == {*names, "teachercache_audit"}, WITHIN_S, stack.why)
    wait_for(lambda: stack.get("importErrors")["import_errors"], WITHIN_S, stack.why)
    (error,) = stack.get("importErrors")["import_errors"]
    assert error["filename"].endswith("teachercache_recipe_errors.py")
    assert f"{stack.recipes}/broken.yaml, line 4: " in error["stack_trace"]


def test_a_scheduled_run_whose_task_is_killed_gives_the_same_bytes_and_students(
    stack: Stack, world: World, roots: Path
) -> None:
    root = roots / "nightly"
    stack.unpause("nightly__cache")
    command = wait_for_first_shards(root)
    before = finished_shards(root)
    assert before and not list((root / "teacher_logits").glob("*/manifest.json"))
    task = command.parent()
    assert task is not None
    task.kill()
    command.wait(timeout=120)  # its command dies with it
    (run,) = stack.wait_for_runs("nightly__cache")
    assert run["run_type"] == "scheduled"
    day = run["logical_date"][:10]
    assert tables(root) == world.plain_run(day)
    after = finished_shards(root)
    assert {path: after[path] for path in before} == before  # finished shards are kept
    instances = stack.tasks("nightly__cache", run["dag_run_id"])
    shards = [task for task in instances if task["task_id"] == "signals.shards"]
    assert sorted(task["try_number"] for task in shards) == [1, 2]
    assert {task["rendered_map_index"] for task in shards} >= {"shards 0:20"}
    retried = max(shards, key=lambda found: found["try_number"])
    log = stack.log_of("nightly__cache", run["dag_run_id"], retried)
    assert "shards are finished already" in log, log
    assert "Traceback" not in log, log
    # The asset, and what it started.
    (event,) = stack.events_of("nightly__cache", run["dag_run_id"])
    assert event["extra"]["date"] == day and event["extra"]["overrides"] == []
    for name, group in (("documents", "documents"), ("signals", "teacher_logits")):
        told = event["extra"]["tables"][name]
        manifest = json.loads(Path(told["manifest"]).read_text())
        assert Path(told["manifest"]).parent.parent == root / group
        assert told["fingerprint"] == manifest["fingerprint"]
        totals = manifest["totals"]
        heads = [file for file in manifest["files"] if file.endswith(".safetensors")]
        beside = sum((Path(told["manifest"]).parent / file).stat().st_size for file in heads)
        assert told["rows"] == totals["num_rows"]
        assert totals["num_bytes"] <= told["bytes"] <= totals["num_bytes"] + beside
        assert (told["bytes"] > totals["num_bytes"]) == bool(heads)
    (trained,) = stack.wait_for_runs("nightly__train")
    assert (trained["run_type"], trained["partition_key"]) == ("asset_triggered", day)
    assert len(list((root / "checkpoints").glob("*/checkpoint.json"))) == 2


def test_days_that_a_backfill_publishes_while_one_trains_are_each_trained(
    stack: Stack, world: World, roots: Path
) -> None:
    """Airflow's own queue for a plain asset holds one waiting event; the others lie there."""
    root, days = roots / "nightly", ("2026-01-05", "2026-01-06", "2026-01-07")
    before = tables(root)
    students = set((root / "checkpoints").glob("*/checkpoint.json"))
    stack.backfill("nightly__cache", days[0], days[-1])
    training = wait_for_command(root, "distilled")
    training.suspend()  # of whichever day is published first
    runs = stack.wait_for_runs("nightly__cache", 4)
    training.resume()
    assert sorted(r["logical_date"][:10] for r in runs if r["run_type"] == "backfill") == [*days]
    after = tables(root)
    assert {folder: after[folder] for folder in before} == before
    made = {folder: after[folder] for folder in after.keys() - before.keys()}
    expected = {name: body for day in days for name, body in world.plain_run(day).items()}
    assert made == expected and len(made) == 6
    trained = stack.wait_for_runs("nightly__train", 4)
    assert {run["partition_key"] for run in trained} > {*days}
    assert len(set((root / "checkpoints").glob("*/checkpoint.json")) - students) == 3


def test_a_step_whose_groups_become_fewer_hands_on_what_is_there(
    stack: Stack, world: World, roots: Path
) -> None:
    """Two groups, then one, then none: Airflow keeps what it knows of the tasks that are gone."""
    dag, root = "nightly__cache", roots / "nightly"
    (scheduled,) = (run for run in stack.runs(dag) if run["run_type"] == "scheduled")
    run, made = scheduled["dag_run_id"], tables(root)
    (event,) = stack.events_of(dag, run)
    stack.pause("nightly__train")
    world.write(
        stack.recipes / "nightly.yaml",
        root,
        name="nightly",
        schedule=yaml.safe_load((stack.recipes / "nightly.yaml").read_text())["schedule"],
        execution__group_size=1000,
    )
    signals = Path(event["extra"]["tables"]["signals"]["manifest"]).parent
    (signals / "manifest.json").unlink()
    max(signals.glob("shard-*.json")).unlink()
    for states in (["success", "removed"], ["removed", "removed"]):
        instances = {
            (task["task_id"], task["map_index"]): task
            for task in stack.run_again(dag, run, "signals.groups")
        }
        shards = [instances["signals.shards", index] for index in range(2)]
        assert [task["state"] for task in shards] == states
        assert instances["signals.finish", -1]["state"] == "success"
        assert tables(root) == made
    first, *others = (found["extra"] for found in stack.events_of(dag, run))
    assert len(others) == 2 and all(other == first for other in others)


def test_a_hung_task_is_timed_out_with_its_command_and_a_late_run_is_told(
    stack: Stack, world: World, roots: Path
) -> None:
    root = roots / "timed"
    stack.unpause("timed__cache")
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    stack.post("dags/timed__cache/dagRuns", {"logical_date": None, "conf": {"date": day}})
    hung = wait_for_first_shards(root)  # stopped: it will neither work nor answer a signal
    before = finished_shards(root)
    hung.wait(timeout=WITHIN_S)
    (run,) = stack.wait_for_runs("timed__cache")
    assert tables(root) == world.plain_run(day)
    after = finished_shards(root)
    assert {path: after[path] for path in before} == before
    instances = stack.tasks("timed__cache", run["dag_run_id"])
    assert max(t["try_number"] for t in instances if t["task_id"] == "signals.shards") > 1
    assert any(
        line.startswith("timed__cache: ") and line.endswith("is not finished after 0.05 minutes")
        for line in stack.webhook.lines
    ), stack.webhook.lines


def test_two_runs_of_one_recipe_at_once_give_the_bytes_of_one(
    stack: Stack, world: World, roots: Path
) -> None:
    root, day = roots / "twice", "2026-01-05"
    stack.unpause("twice__cache")
    for _ in range(2):
        stack.post("dags/twice__cache/dagRuns", {"logical_date": None, "conf": {"date": day}})
    stack.wait_for_runs("twice__cache", 2)
    expected = world.plain_run(day)
    assert tables(root) == expected
    assert not list(root.rglob("*.tmp-*"))


def test_a_wrong_parameter_is_refused_and_a_wrong_recipe_fails_at_its_first_try(
    stack: Stack,
) -> None:
    refused = stack.client.post(
        "/api/v2/dags/twice__cache/dagRuns", json={"logical_date": None, "conf": {"workers": 0}}
    )
    assert refused.status_code in (400, 422) and "less than the minimum of 1" in refused.text
    conf = {"date": "2026-01-05", "overrides": ["steps.signals.encoding.kind=none"]}
    run = stack.post("dags/twice__cache/dagRuns", {"logical_date": None, "conf": conf})
    dag, name = "twice__cache", run["dag_run_id"]
    wait_for(
        lambda: stack.get(f"dags/{dag}/dagRuns/{name}")["state"] == "failed", WITHIN_S, stack.why
    )
    plan = next(task for task in stack.tasks(dag, name) if task["task_id"] == "plan")
    assert (plan["state"], plan["try_number"]) == ("failed", 1)
    wait_for(
        lambda: any("twice__cache.plan of" in line for line in stack.webhook.lines),
        WITHIN_S,
        stack.why,
    )
    assert "steps.signals.encoding" in stack.webhook.lines[-1]
