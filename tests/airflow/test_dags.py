"""The DAGs by themselves: their graphs, what is wrong with a recipe, runs without a scheduler."""

import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import Asset
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowSkipException,
    AirflowTaskTimeout,
)
from airflow.serialization.serialized_objects import DagSerialization as SerializedDAG
from conftest import DAGS, REPOSITORY, World, tables, teachercache
from teachercache_command import Call, Process, calls, extra_of, raise_for
from teachercache_tasks import AuditOperator, ReportOperator, TeachercacheOperator

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.yaml"))


def bag() -> DagBag:
    return DagBag(str(DAGS), collect_dags=True)


def edges(dag: Any) -> dict[str, set[str]]:
    return {task.task_id: set(task.upstream_task_ids) for task in dag.tasks}


def the_import_error(found: DagBag) -> list[str]:
    """The lines of the one import error, without its traceback."""
    (error,) = found.import_errors.values()
    assert all("teachercache_recipe_errors.py" in name for name in found.import_errors)
    return str(error).split("RecipeError: ")[1].strip().split("\n")


def test_each_recipe_has_a_dag_that_caches_and_one_that_trains(recipes: Path) -> None:
    for path in EXAMPLES:
        shutil.copy(path, recipes)
    found = bag()
    assert not found.import_errors
    names = [f"{path.stem.replace('_', '-')}__{what}" for path in EXAMPLES for what in WHAT]
    assert sorted(found.dags) == sorted([*names, "teachercache_audit"])
    recipes_audited = edges(found.dags["teachercache_audit"])
    verified = {name.split("__")[0] for name in names}
    assert {name for name, needs in recipes_audited.items() if not needs} == verified
    assert recipes_audited["quickstart_audit"] == {"quickstart"}
    live = found.dags["teachercache_audit"].get_task("quickstart_audit")
    assert live.pool == found.dags["quickstart__cache"].get_task("signals.finish").pool
    assert [asset.name for asset in live.outlets] == ["teachercache_quickstart_audit"]
    assert edges(found.dags["quickstart__cache"]) == {
        "plan": set(),
        "documents": {"plan"},
        "signals.groups": {"documents"},
        "signals.shards": {"signals.groups"},
        "signals.finish": {"signals.shards"},
        "verify": {"signals.finish"},
        "publish": {"verify"},
        "report": {"publish"},
    }
    assert edges(found.dags["quickstart__train"]) == {
        "student": set(),
        "cross_entropy_only": {"student"},
        "distilled": {"student"},
        "report": {"cross_entropy_only", "distilled"},
    }
    chain = edges(found.dags["adpa__cache"])  # a table of a model that an earlier step trains
    assert chain["sft_responses.groups"] == {"pairs", "sft"}
    assert chain["sft_advantages.groups"] == {"sft_responses.finish", "aligned_teacher"}
    document = found.dags["quickstart__cache"].doc_md
    assert (REPOSITORY / "examples" / "quickstart.yaml").read_text() in document


WHAT = ("cache", "train")


def test_the_schedule_of_a_recipe_is_that_of_its_dags(recipes: Path, world: World) -> None:
    schedule = {
        "cron": "0 3 * * *",
        "max_active_runs": 2,
        "max_parallel_groups": 3,
        "tags": ["nightly"],
        "pool": "gpu",
        "retries": 5,
        "retry_delay_s": 30,
        "timeout_minutes": 90,
        "deadline_minutes": 240,
    }
    world.write(recipes / "tiny.yaml", recipes / "root", schedule=schedule)
    cache, train = (bag().dags[f"tiny__{what}"] for what in WHAT)
    assert cache.timetable.expression == "0 3 * * *" and not cache.catchup
    assert cache.max_active_runs == 2 and {"nightly", "teachercache"} <= set(cache.tags)
    shards, documents = cache.get_task("signals.shards"), cache.get_task("documents")
    assert (shards.pool, documents.pool) == ("gpu", "default_pool")
    assert shards.max_active_tis_per_dagrun == 3
    for task in (shards, documents, train.get_task("distilled")):
        assert task.retries == 5 and task.retry_delay.total_seconds() == 30
        assert task.execution_timeout.total_seconds() == 90 * 60
        assert task.retry_exponential_backoff and task.on_failure_callback
    (deadline,) = cache.deadline if isinstance(cache.deadline, list) else [cache.deadline]
    assert deadline.interval.total_seconds() == 240 * 60
    asset = cache.get_task("publish").outlets[0]
    assert asset.uri == "teachercache://tiny/"
    assert train.timetable.asset_condition.uri == asset.uri
    assert cache.is_paused_upon_creation is None and train.is_paused_upon_creation is False


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: [a\n", "line 2: did not find expected ',' or ']'"),
        ("a: 1\n", "line 1: the recipe has no 'name'"),
        ("name: b\n", "line 1: the recipe has no 'steps'"),
        ("- a\n", "line 1: the recipe is not a mapping"),
        ("", "line 1: the recipe is not a mapping"),
        ("name: a b\nsteps: {}\n", "line 1: name 'a b' has other characters than"),
        ("name: b\nsteps:\n  s: 3\n", "line 3: 's' is not a mapping"),
        ("name: b\nsteps:\n  s:\n    stage: x\n", "line 4: stage 'x' found, expected one of"),
        ("name: b\nsteps:\n  plan: {stage: train}\n", "line 3: step 'plan' cannot be a task"),
        ("name: b\nsteps: {}\n", "line 2: there are no steps"),
        (
            "name: b\nsteps: {a: {stage: train}}\nschedule:\n  crn: x\n",
            "line 4: schedule.crn: no such setting",
        ),
        (
            "name: b\nsteps: {a: {stage: train}}\nschedule: {retries: -1}\n",
            "line 3: schedule.retries is -1, expect",
        ),
        (
            "name: b\nsteps: {a: {stage: train}}\nschedule: {catchup: 1}\n",
            "line 3: schedule.catchup is 1, expected",
        ),
        (
            "name: b\nsteps: {a: {stage: train}}\nschedule: {cron: a}\n",
            "line 3: schedule.cron is 'a', expected five",
        ),
        (
            "name: b\nsteps: {a: {stage: train}}\nschedule: {runner: x}\n",
            "line 3: schedule.runner is 'x', expected",
        ),
    ],
)
def test_a_bad_recipe_is_an_import_error_and_the_others_stay(
    recipes: Path, text: str, problem: str
) -> None:
    shutil.copy(REPOSITORY / "examples" / "quickstart.yaml", recipes)
    bad = recipes / "bad.yaml"
    bad.write_text(text)
    found = bag()
    (line,) = the_import_error(found)
    assert line.startswith(f"{bad}, {problem}"), line
    assert sorted(found.dags) == ["quickstart__cache", "quickstart__train", "teachercache_audit"]


def test_two_recipes_of_one_name_are_one_line_that_names_both(recipes: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        shutil.copy(REPOSITORY / "examples" / "quickstart.yaml", recipes / name)
    shutil.copy(REPOSITORY / "examples" / "dckd.yaml", recipes)
    found = bag()
    assert the_import_error(found) == [
        f"{recipes}/a.yaml and {recipes}/b.yaml are both named 'quickstart': rename one, neither "
        f"runs until then"
    ]
    assert sorted(found.dags) == ["dckd__cache", "dckd__train", "teachercache_audit"]


def test_a_folder_that_does_not_exist_is_an_import_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHERCACHE_RECIPES", str(tmp_path / "none"))
    assert "does not exist: make it or name another" in the_import_error(bag())[0]


PARSE = """
import sys, time
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import Asset
sys.path.append(sys.argv[1])
start = time.process_time()
bag = DagBag(sys.argv[1])
print(len(bag.dags), time.process_time() - start, file=sys.stderr)
ours = {"pipeline", "schemas", "stages", "torch", "numpy", "pyarrow", "pandas"}
print(sorted(ours & set(sys.modules)), file=sys.stderr)
"""


def test_twenty_recipes_are_parsed_in_less_than_a_second(recipes: Path) -> None:
    text = (REPOSITORY / "examples" / "adpa_plus.yaml").read_text()
    for number in range(20):
        (recipes / f"{number}.yaml").write_text(text.replace("name: adpa", f"name: r{number}-adpa"))
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(DAGS)], capture_output=True, text=True, check=True
    )
    *_, figures, loaded = done.stderr.strip().splitlines()
    number_of_dags, seconds = figures.split()
    sys.stdout.write(f"20 recipes, {number_of_dags} DAGs, both files: {float(seconds):.2f} s\n")
    assert int(number_of_dags) == 41 and loaded == "[]"
    assert float(seconds) < 3.0  # of the processor: 0.6 on a quiet machine


POD = """
apiVersion: v1
kind: Pod
spec:
  containers:
    - name: base
      image: registry.example/teachercache:1
      env: [{name: HF_HUB_OFFLINE, value: "1"}]
      resources: {limits: {nvidia.com/gpu: "1"}}
"""


KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: none
contexts: [{name: none, context: {cluster: none, user: none}}]
clusters: [{name: none, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: none, user: {}}]
"""


def test_a_pod_has_the_template_and_the_command_of_its_step(
    recipes: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider's own operator builds it; there is no cluster to run it on."""
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator

    template, config = tmp_path / "pod.yaml", tmp_path / "kubeconfig"
    template.write_text(POD)
    config.write_text(KUBECONFIG)
    monkeypatch.setenv("TEACHERCACHE_POD_TEMPLATE", str(template))
    path = world.write(recipes / "pods.yaml", tmp_path / "root", schedule={"runner": "kubernetes"})
    found = bag()
    assert not found.import_errors
    (name,) = (name for name in found.dags if name.endswith("__cache"))
    pods: list[Any] = []
    monkeypatch.setattr(
        KubernetesPodOperator,
        "execute",
        lambda self, context: pods.append(self.build_pod_request_obj(None)),
    )
    documents = found.dags[name].get_task("documents")
    documents.config_file = str(config)
    documents.execute(context_of(logical_date=datetime(2026, 1, 2, tzinfo=UTC)))
    (container,) = pods[0].spec.containers
    assert container.image == "registry.example/teachercache:1"
    assert container.resources.limits == {"nvidia.com/gpu": "1"}
    assert container.command == ["teachercache"]
    assert container.args == ["run", str(path), "--step", "documents"]
    variables = {variable.name: variable.value for variable in container.env}
    assert variables == {"HF_HUB_OFFLINE": "1", "DS": "2026-01-02"}


def test_pods_without_their_provider_are_an_import_error(
    recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    missing = "airflow.providers.cncf"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    text = "name: b\nsteps: {a: {stage: train}}\nschedule:\n  runner: kubernetes\n"
    (recipes / "bad.yaml").write_text(text)
    (line,) = the_import_error(bag())
    expected = "line 4: schedule.runner is kubernetes: install apache-airflow-providers-cncf-kuber"
    assert line.startswith(f"{recipes / 'bad.yaml'}, {expected}")


# What a run is about.


def context_of(**values: Any) -> Any:
    run = SimpleNamespace(
        logical_date=values.get("logical_date"),
        run_after=datetime(2026, 3, 4, tzinfo=UTC),
        partition_key=values.get("partition"),
    )
    params = {"date": None, "overrides": [], "workers": None, **values.get("params", {})}
    events = [SimpleNamespace(extra=extra) for extra in values.get("extras", ())]
    return {"params": params, "dag_run": run, "triggering_asset_events": {"asset": events}}


def test_a_run_is_about_its_date_its_parameter_or_its_events() -> None:
    def asked(**values: Any) -> list[tuple[str, tuple[str, ...]]]:
        return [(call.date, call.overrides) for call in calls(context_of(**values), "r.yaml")]

    day = datetime(2026, 1, 2, tzinfo=UTC)
    assert asked(logical_date=day) == [("2026-01-02", ())]
    assert asked() == [("2026-03-04", ())]
    assert asked(partition="2026-01-03") == [("2026-01-03", ())]  # a training begun by hand
    given = {"date": "2026-01-09", "overrides": ["a.b=1"], "workers": 2}
    expected = ("a.b=1", "execution.workers=2")
    assert asked(logical_date=day, params=given) == [("2026-01-09", expected)]
    extras = [{"date": day, "overrides": ["c=3"]} for day in ("d1", "d2", "d1")]
    assert asked(extras=extras) == [("d1", ("c=3",)), ("d2", ("c=3",))]  # each once, none lost
    call = Call("r.yaml", "d1", ("a=1",))
    assert call.arguments("run", "--step", "s") == ["run", "r.yaml", "--step", "s", "--set", "a=1"]


def test_exit_codes_decide_whether_a_task_is_tried_again() -> None:
    raise_for(0, "")
    for code in (2, 3):
        with pytest.raises(AirflowFailException, match=r"^steps\.x: bad \(exit code 2|3\)$"):
            raise_for(code, "error: steps.x: bad")
    for code in (1, 70, 130, -9):
        with pytest.raises(AirflowException) as error:
            raise_for(code, "error: the engine died")
        assert not isinstance(error.value, AirflowFailException)
    assert str(error.value) == "the engine died (ended by SIGKILL)"


@pytest.mark.parametrize("root", ["s3://bucket/prefix", "/mnt/cache"])
def test_the_assets_event_names_manifests_that_can_be_opened(root: str) -> None:
    step = {"kind": "table", "fingerprint": "f", "num_rows": 1, "num_bytes": 2}
    steps = {"signals": step | {"folder": f"{root}/teacher_logits/0123"}}
    extra = extra_of(Call("r.yaml", "2026-01-01", ()), steps)
    assert extra["tables"]["signals"]["manifest"] == f"{root}/teacher_logits/0123/manifest.json"


def test_a_command_that_is_not_there_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHERCACHE_COMMAND", "/nowhere/teachercache")
    with pytest.raises(AirflowFailException, match="cannot start /nowhere/teachercache"):
        Process(["plan"], Call(str(tmp_path / "r.yaml"), "2026-01-01", ()))


SLOW = """
import os, subprocess, sys, time
if len(sys.argv) > 2:
    child = subprocess.Popen([sys.executable, __file__])
    print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def assert_gone(pids: list[int]) -> None:
    """Fail where one of them lives on, other than as an entry that nobody has asked for."""
    deadline = time.monotonic() + 120
    while any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        for pid in pids
    ):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


def test_a_timeout_and_a_killed_task_take_all_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command and its child: ended by a time-out, and by the death of the task's process."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    monkeypatch.setenv("TEACHERCACHE_COMMAND", f"{sys.executable} {script}")
    task = TeachercacheOperator(task_id="t", recipe=str(tmp_path / "r.yaml"), arguments=["run"])
    said: list[str] = []

    def interrupted(number: int, frame: Any) -> None:
        raise AirflowTaskTimeout("too long")

    def heard(line: str) -> None:
        said.append(line)
        signal.alarm(1)  # it works: now it takes too long

    signal.signal(signal.SIGALRM, interrupted)
    task._process = Process(["run", "x"], Call(str(tmp_path / "r.yaml"), "2026-01-01", ()))
    with pytest.raises(AirflowTaskTimeout):
        task._process.follow(heard)
    task.on_kill()
    pids = [int(word) for word in said[0].split()]
    assert len(pids) == 2
    assert_gone(pids)


def test_a_recipe_run_by_its_dags_gives_the_bytes_of_a_plain_run(
    recipes: Path, world: World, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    world.write(recipes / "tiny.yaml", root)
    dag, conf = bag().dags["tiny__cache"], {"date": "2026-01-05"}
    run = dag.test(run_conf=conf)
    assert run.state == "success"
    assert tables(root) == world.plain_run("2026-01-05")
    again = dag.test(run_conf=conf)
    states = {task.task_id: task.state for task in again.get_task_instances()}
    assert again.state == "success" and states["signals.shards"] == "skipped"
    assert states["signals.finish"] == states["publish"] == "success"


def test_the_last_task_links_to_the_page_of_the_run(
    recipes: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page lies below the root; the link is to there, or to where reports are served."""
    root = tmp_path / "root"
    world.write(recipes / "tiny.yaml", root)
    dag, page = bag().dags["tiny__cache"], root / "reports" / "tiny.html"
    for served, link in (
        ("", page.as_uri()),
        ("https://reports.example/x/", "https://reports.example/x/tiny.html"),
    ):
        monkeypatch.setenv("TEACHERCACHE_REPORTS_URL", served)
        page.unlink(missing_ok=True)
        run = dag.test(run_conf={"date": "2026-01-05"})
        (report,) = (task for task in run.get_task_instances() if task.task_id == "report")
        assert run.state == report.state == "success"
        assert "Content-Security-Policy" in page.read_text()
        key = dag.get_task("report").operator_extra_links[0].xcom_key
        assert report.xcom_pull(task_ids="report", key=key) == link
    stored = SerializedDAG.to_dict(dag)["dag"]["tasks"]
    (task,) = (each["__var"] for each in stored if each["__var"]["task_id"] == "report")
    assert task["_operator_extra_links"] == {"Report": key}


def test_a_command_that_cannot_draw_skips_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "bare.py"
    task = ReportOperator(task_id="report", recipe=str(tmp_path / "r.yaml"), arguments=["report"])
    monkeypatch.setenv("TEACHERCACHE_COMMAND", f"{sys.executable} {script}")
    for problem, raised in (
        ("vl_convert is not installed: install teachercache[report]", AirflowSkipException),
        ("steps.x: bad", AirflowFailException),
    ):
        script.write_text(f"import sys; sys.exit(print('error: {problem}') or 2)")
        with pytest.raises(raised, match=re.escape(problem)):
            task.execute(context_of())


def test_a_wrong_override_fails_the_plan_at_its_first_try(
    recipes: Path, world: World, tmp_path: Path
) -> None:
    world.write(recipes / "tiny.yaml", tmp_path / "root")
    conf = {"date": "2026-01-05", "overrides": ["steps.signals.encoding.kind=none"]}
    run = bag().dags["tiny__cache"].test(run_conf=conf)
    states = {task.task_id: (task.state, task.try_number) for task in run.get_task_instances()}
    assert states["plan"] == ("failed", 1) and states["documents"][0] == "upstream_failed"
    assert not (tmp_path / "root").exists()


def test_the_audit_finds_a_damaged_shard(recipes: Path, world: World, tmp_path: Path) -> None:
    root = tmp_path / "root"
    path = world.write(recipes / "tiny.yaml", root, execution__workers=1)
    teachercache("run", str(path), "--step", "documents", DS="2026-01-06")
    assert bag().dags["teachercache_audit"].test().state == "success"
    shard = next((root / "documents").glob("*/shard-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert bag().dags["teachercache_audit"].test().state == "failed"


STAND_IN = """
import json, sys
word, outcome = sys.argv[1], {outcome!r}
audit = {{"outcome": outcome, "audited_at": "2026-01-06T00:00:00+00:00", "num_rows": 12}}
step = {{"name": "signals", "kind": "table", "state": {state!r}, "has_audit": True}}
if word == "plan":
    print(json.dumps([step | {{"audit": audit}}]))
else:
    print("signals:", outcome)
    sys.exit(outcome != "faithful")
"""


@pytest.mark.parametrize(
    ("outcome", "state", "ends"),
    [
        ("faithful", "done", ""),
        ("unfaithful", "done", "not what the live teacher says: signals (12 rows audited)"),
        ("faithful", "pending", "no signal is finished yet"),
    ],
)
def test_the_verdict_of_a_live_teacher_is_an_event_or_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str, state: str, ends: str
) -> None:
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN.format(outcome=outcome, state=state))
    monkeypatch.setenv("TEACHERCACHE_COMMAND", f"{sys.executable} {program}")
    asset = Asset(name="a", uri="teachercache://a/audit")
    recipe = str(tmp_path / "a.yaml")
    task = AuditOperator(task_id="audit", recipe=recipe, arguments=["audit"], asset=asset)
    event = SimpleNamespace(extra={})
    run = SimpleNamespace(partition_key="2026-01-06")
    context: Any = {"params": {}, "dag_run": run, "outlet_events": {asset: event}}
    if ends:
        with pytest.raises(AirflowException) as raised:
            task.execute(context)
        assert str(raised.value).startswith(ends) and "\n" not in str(raised.value)
        assert event.extra == {}
    else:
        task.execute(context)
        assert event.extra["date"] == "2026-01-06"
        assert event.extra["verdicts"]["signals"]["outcome"] == "faithful"
