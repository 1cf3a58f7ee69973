"""Whole runs with their root on a real S3 server: the bytes of a local run, come what may."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline.executors.training_job import TrainingJob
from pipeline.planning.plan import PlannedStep
from pipeline.state import lease_lock
from pipeline.state.audit_verdict import verdict_of
from pipeline.state.step_lock import LOCK_FILE, step_lock
from schemas.dataset import open_dataset
from schemas.errors import StoreError
from schemas.storage.files import as_folder, write_text
from schemas.storage.manifest import read_manifest
from schemas.storage.object_path import ObjectPath
from stages.models.checkpoints.checkpoint import local_copy, read_checkpoint
from stages.models.checkpoints.tokenizer_identity import TEMPLATE_FOLDER, tokenizer_fingerprint
from stages.signals.teacher_logits.calibration import keep_first, read_calibration
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainStage
from tests.fixtures.machine_speed import slowness
from tests.fixtures.tiny_recipe import TinyRecipe, finish, make_recipe, start, teachercache
from tests.servers.ray_cluster import ENVIRONMENT as RAY_ENVIRONMENT
from tests.servers.s3_server import (
    CUT_REPLY,
    CUT_REQUEST,
    KEY_ID,
    PASS,
    SECRET,
    Server,
    faulty_proxy,
    running_server,
    use_endpoint,
)

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
NUM_PARAGRAPHS = 90
STUDENTS = {
    "student": {"stage": "student_init", "model": "teacher", "layers": 2},
    "trained": {
        "stage": "train",
        "student": "student",
        "data": ["documents", "signals"],
        "objective": {"loss": "kd", "weight": 0.9},
        "max_steps": 6,
        "per_device_batch_size": 4,
    },
    "measured": {
        "stage": "evaluate",
        "students": ["student", "trained"],
        "data": ["documents", "signals"],
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture(autouse=True)
def machine(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has this store's credentials, and nothing in its cache yet."""
    use_endpoint(monkeypatch, server.url)
    monkeypatch.setenv("TEACHERCACHE_CACHE", str(tmp_path / "machine"))


@pytest.fixture(scope="module")
def local(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    """The recipe, with students, run whole on a local root."""
    folder = tmp_path_factory.mktemp("local")
    recipe = make_recipe(folder, tiny_model, paragraphs[:NUM_PARAGRAPHS], more_steps=STUDENTS)
    recipe.run()
    return recipe


@pytest.fixture
def root(server: Server, machine: None) -> str:
    return server.new_root()


def on_store(recipe: TinyRecipe, root: str, folder: Path, *names: str) -> TinyRecipe:
    """Return the recipe with its root in the store, or only these steps of it."""
    body = yaml.safe_load(recipe.path.read_text())
    body["execution"]["root"] = root
    body["steps"] = {name: body["steps"][name] for name in names or body["steps"]}
    path = folder / "store.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return TinyRecipe(path, folder)


def tables(recipe: TinyRecipe) -> dict[str, tuple[str, list[str]]]:
    """What has to be equal: the data set's id and each shard's checksum."""
    found = {}
    for step in recipe.plan():
        if step.writes_table:
            manifest = read_manifest(step.place)
            found[step.name] = (manifest.dataset_id, [shard.sha256 for shard in manifest.shards])
    return found


def losses(step: PlannedStep) -> list[float]:
    record = read_checkpoint(step.place)
    assert record is not None
    return [entry["loss"] for entry in record.history]


@pytest.mark.slow
def test_tables_in_a_store_are_those_on_a_disk(
    root: str, tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:30])
    recipe.run()
    stored = on_store(recipe, root, tmp_path)
    assert len(stored.run().made) > 4
    assert tables(stored) == tables(recipe)
    assert set(stored.run().states.values()) == {"done"}


@pytest.mark.slow
def test_a_tau_that_is_found_on_a_store_is_that_of_a_disk_and_stays(
    root: str, tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:30])
    encoding = "steps.signals.encoding={kind: threshold, mean_k: 9}"
    recipe.run(encoding)
    stored = on_store(recipe, root, tmp_path)
    stored.run(encoding)
    here, there = (each.step("signals", encoding).place for each in (recipe, stored))
    found = read_calibration(there)
    assert found is not None and found == read_calibration(here)
    assert keep_first(there, replace(found, tau=0.5)) == found == read_calibration(there)
    assert read_manifest(there).files == read_manifest(here).files
    assert read_manifest(there).dataset_id == read_manifest(here).dataset_id
    said = teachercache("verify", str(there))
    assert said.code == 0, said
    record = next(iter(read_manifest(there).shards)).name
    body = json.loads((there / f"{record}.json").read_bytes())
    body["notes"]["tau"] = 0.5
    write_text(there / f"{record}.json", json.dumps(body))
    said = teachercache("verify", str(there))
    assert (
        said.code == 1 and f"was made with tau 0.5, calibration.json says {found.tau}" in said.out
    )


@pytest.mark.slow
def test_a_run_on_a_store_is_a_local_run(
    local: TinyRecipe, root: str, server: Server, tmp_path: Path
) -> None:
    recipe = on_store(local, root, tmp_path)
    events = recipe.run()
    assert set(events.states.values()) == {"pending"} and len(events.finished) == 5
    here, there = local.plan(), recipe.plan()
    assert [step.fingerprint for step in here] == [step.fingerprint for step in there]
    assert tables(recipe) == tables(local)
    for ours, theirs in zip(here, there, strict=True):
        if ours.writes_table:
            manifest = (ours.folder / "manifest.json").read_bytes()
            assert (theirs.place / "manifest.json").read_bytes() == manifest
    for name in ("student", "trained"):
        one, other = (read_checkpoint(r.step(name).place) for r in (local, recipe))
        assert one is not None and other is not None
        assert one.files["model.safetensors"] == other.files["model.safetensors"]
    assert losses(recipe.step("trained")) == losses(local.step("trained")) != []
    # Nothing is made again, and nothing is left behind: no lock, no part, no scratch folder.
    again = recipe.run()
    assert set(again.states.values()) == {"done"} and not again.made
    objects = server.objects(root)
    assert not server.uploads(root) and not [key for key in objects if LOCK_FILE in key]
    assert not list((tmp_path / "machine" / "work").iterdir())
    # Credentials are in no object and in no file that the run left on this machine.
    written = [*objects.values(), *(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())]
    assert not [1 for body in written if KEY_ID.encode() in body or SECRET.encode() in body]


@pytest.mark.slow
def test_completion_is_never_learnt_from_a_list(
    local: TinyRecipe, root: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside GETs by name there is the question for uploads that a dead run left."""
    recipe = on_store(local, root, tmp_path, "documents", "signals")
    with faulty_proxy(server) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        recipe.run()
        assert teachercache("plan", recipe.path).code == 0
        said = teachercache("status", recipe.path, "--json")
        assert [step["state"] for step in json.loads(said.out)] == ["done", "done"]
        before = len(proxy.seen)
        recipe.run()
        # Two steps that are done cost the manifests alone, however many shards they have.
        assert {path.rsplit("/", 1)[1] for _, path in proxy.seen[before:]} == {"manifest.json"}
        before = len(proxy.seen)
        assert "2 of 2 steps done" in teachercache("show", recipe.path).out
        asked = {path.rsplit("/", 1)[1] for _, path in proxy.seen[before:]}
        assert asked == {"manifest.json", "shards.feather"}
        listed = [path for _, path in proxy.seen if "list-type" in path or "delimiter" in path]
        assert not listed
        # The record comes after its shard, the manifest after every record.
        signals = recipe.step("signals").place.name
        written = [
            p.split("?")[0] for m, p in proxy.seen if m == "PUT" and f"{signals}/shard-" in p
        ]
        assert [path.rsplit(".", 1)[1] for path in written] == ["arrow", "json"] * (
            len(written) // 2
        )
        manifests = [path for m, path in proxy.seen if m == "PUT" and "manifest" in path]
        assert len(manifests) == 2


@pytest.mark.slow
def test_commands_take_places_in_a_store(local: TinyRecipe, root: str, tmp_path: Path) -> None:
    recipe = on_store(local, root, tmp_path)
    assert teachercache("run", recipe.path).code == 0
    said = teachercache("verify", root)
    assert said.code == 0 and said.out.count(": ok") == 5, said
    documents, signals = (str(recipe.step(name).place) for name in ("documents", "signals"))
    said = teachercache("inspect", signals, "--row", "2")
    assert said.code == 0 and "row 2" in said.out
    given = [str(recipe.step("trained").place), "--data", documents, "--data", signals, "--json"]
    numbers = json.loads(teachercache("evaluate", *given).out)
    folders = [str(local.step(name).folder) for name in ("trained", "documents", "signals")]
    given = [folders[0], "--data", folders[1], "--data", folders[2], "--json"]
    expected = json.loads(teachercache("evaluate", *given).out)
    assert {**numbers, "student": ""} == {**expected, "student": ""}
    # A byte that has changed is found in the store itself, whatever copies there are here.
    shard = (
        recipe.step("signals").place / read_manifest(recipe.step("signals").place).shards[1].file
    )
    assert isinstance(shard, ObjectPath)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    said = teachercache("verify", signals)
    assert said.code == 1 and f"{shard} has sha256 " in said.out
    assert teachercache("inspect", "s3://nowhere-at-all/x").error.startswith("bucket 'nowhere-at")
    recipe.path.write_text(recipe.path.read_text().replace(root, "s3://nowhere-at-all/x"))
    said = teachercache("run", recipe.path)
    assert said.code == 2 and said.error.startswith("bucket 'nowhere-at-all' does not exist")


def kill_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_run_again_only_the_shards_in_hand_are_made_again(
    local: TinyRecipe,
    root: str,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    """It is killed when three shards have their records and the fourth is about to have its own."""
    recipe = on_store(local, root, tmp_path, "documents", "signals")
    signals = recipe.step("signals").place
    assert isinstance(signals, ObjectPath)
    wide = ("run", recipe.path, "--set", f"execution.workers={workers}")
    number, fourth, killed = itertools.count(), threading.Event(), threading.Event()

    def held(method: str, path: str) -> str:
        is_record = signals.name in path and path.partition("?")[0].endswith(".json")
        if method == "PUT" and is_record and next(number) >= 3:
            fourth.set()
            killed.wait()
            return CUT_REQUEST
        return PASS

    with faulty_proxy(server) as proxy:
        proxy.fault = held
        process = start(*wide, **ENVIRONMENT, AWS_ENDPOINT_URL=proxy.url)
        while not fourth.wait(0.05):
            assert process.poll() is None
        kill_group(process)
        killed.set()
    before = server.client.list_objects_v2(Bucket=root.split("/")[2])["Contents"]
    times = {entry["Key"]: entry["LastModified"] for entry in before}
    assert any(key.endswith(LOCK_FILE) for key in times)  # a dead run cannot take its lock away
    made = {key for key in times if str(signals.name) in key and key.endswith(".arrow")}
    recorded = {key for key in times if str(signals.name) in key and key.endswith(".json")}
    assert len(recorded) == 3 and 1 <= len(made) - len(recorded) <= workers
    time.sleep(1.1)  # the store's times are whole seconds
    assert finish(start(*wide, **ENVIRONMENT)).code == 0
    assert tables(recipe) == {name: tables(local)[name] for name in ("documents", "signals")}
    after = server.client.list_objects_v2(Bucket=root.split("/")[2])["Contents"]
    again = {e["Key"]: e["LastModified"] for e in after}
    assert {key: again[key] for key in recorded} == {key: times[key] for key in recorded}
    assert not any(key.endswith(LOCK_FILE) for key in again) and not server.uploads(root)


@pytest.mark.slow
def test_a_run_among_faults_is_a_run(
    local: TinyRecipe, root: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each seventh request fails: with a 500, cut before it is seen, or cut in the reply."""
    recipe = on_store(local, root, tmp_path)
    with faulty_proxy(server) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        faults = ("error", "cut request", "cut reply")

        def fault(method: str, path: str) -> str:
            number = len(proxy.seen)
            return faults[number // 7 % 3] if number % 7 == 0 else PASS

        proxy.fault = fault
        recipe.run()
        assert len(proxy.seen) > 70
    use_endpoint(monkeypatch, server.url)
    assert tables(recipe) == tables(local)
    assert losses(recipe.step("trained")) == losses(local.step("trained"))
    assert not server.uploads(root)


def test_a_second_run_is_refused_while_the_first_renews(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_lock, "RENEW_S", 0.5)
    place = ObjectPath(f"{root}/teacher_logits/0123")
    lost: list[str] = []
    with step_lock(place, warned=lost.append):
        with pytest.raises(StoreError) as caught, step_lock(place):
            pass
        expected = f"{place} is being written by process {os.getpid()} on {os.uname().nodename};"
        assert str(caught.value).startswith(expected)
    assert not lost
    with step_lock(place):  # given back: no waiting
        pass


def test_a_lock_whose_reply_was_lost_is_ours(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is sent again, and finds there what the first one wrote."""
    place = ObjectPath(f"{root}/teacher_logits/0123")
    with faulty_proxy(server) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        proxy.fault = lambda method, path: CUT_REPLY if proxy.count("PUT") == 1 else PASS
        told: list[str] = []
        with step_lock(place, warned=told.append):
            assert proxy.count("PUT") == 2 and not told
    assert not server.objects(root)


def test_the_lease_of_a_dead_run_is_taken_over_and_a_lost_one_is_told(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_lock, "RENEW_S", 0.5)
    monkeypatch.setattr(lease_lock, "LEASE_S", 1.0)
    place = ObjectPath(f"{root}/teacher_logits/0123")
    lost: list[str] = []
    (place / LOCK_FILE).write_bytes(b"process 1 on a machine that is gone, 0")
    began = time.monotonic()
    with step_lock(place, warned=lost.append):
        assert lost.pop().startswith(f"{place} is held by process 1 on a machine that is gone: ")
        assert 0.9 < time.monotonic() - began < 5.0 * slowness()
        (place / LOCK_FILE).write_bytes(b"process 2 on another machine, 1")  # as if we had slept
        while not lost:
            time.sleep(0.05)
    assert lost[0].startswith(f"another run has taken {place}")
    assert (place / LOCK_FILE).is_file()  # it is the other's to give back


@pytest.fixture(scope="module")
def stored(
    local: TinyRecipe, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TinyRecipe]:
    """The tables and the student that training needs, in the store."""
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        use_endpoint(patch, server.url)
        patch.setenv("TEACHERCACHE_CACHE", str(folder / "machine"))
        root = server.new_root()
        on_store(local, root, folder, "documents", "signals", "student").run()
        yield on_store(local, root, folder)


def job_of(recipe: TinyRecipe, output: str) -> TrainingJob:
    step = recipe.step("trained")
    assert isinstance(step.stage, TrainStage)
    return TrainingJob(
        config=step.stage.model_copy(update={"max_steps": 10}),
        student=step.models["student"].base,
        data=tuple(source.place for source in step.inputs),
        output=as_folder(output),
        fingerprint="f" * 64,
        options=TrainOptions(log_every=1, checkpoint_every=3),
    )


def history(job: TrainingJob) -> list[float]:
    record = read_checkpoint(job.output)
    assert record is not None
    return [entry["loss"] for entry in record.history]


@pytest.mark.slow
def test_training_from_a_cache_that_is_too_small_has_the_same_losses(
    local: TinyRecipe, stored: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for the student and two shards; the loader's worker is a process of its own."""
    job_of(local, str(tmp_path / "local")).carry_out(lambda event: None)
    student = read_checkpoint(stored.step("student").place)
    assert student is not None
    folder = local.step("student").folder
    room = sum((folder / name).stat().st_size for name in student.files)
    shards = [read_manifest(local.step(name).folder).shards for name in ("documents", "signals")]
    room += 2 * max(shard.num_bytes for table in shards for shard in table)
    assert room < sum(shard.num_bytes for table in shards for shard in table) + room / 2
    monkeypatch.setenv("TEACHERCACHE_CACHE_GB", str(room / 1e9))
    output = str(stored.step("trained").place.parent / "small-cache")
    job_of(stored, output).carry_out(lambda event: None)
    assert history(job_of(stored, output)) == history(job_of(local, str(tmp_path / "local")))
    kept = (tmp_path / "machine" / "shards").iterdir()
    assert 0 < sum(path.stat().st_size for path in kept if path.suffix != ".lock") <= room


class _Died(Exception):
    pass


@pytest.mark.slow
def test_training_that_died_goes_on_on_another_machine(
    local: TinyRecipe, stored: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_of(local, str(tmp_path / "local")).carry_out(lambda event: None)
    job = job_of(stored, str(stored.step("trained").place.parent / "two-machines"))
    assert isinstance(job.output, ObjectPath)

    def die(event: dict[str, object]) -> None:
        if event.get("step") == 8:
            raise _Died

    with pytest.raises(_Died):
        job.carry_out(die)
    latest = json.loads((job.output / "checkpoints" / "latest.json").read_bytes())
    assert latest["name"] == "checkpoint-6"
    names = {path.url.split("/")[-2] for path in job.output.find()}
    assert names == {"checkpoints", "checkpoint-6"}  # the one before has gone
    monkeypatch.setenv("TEACHERCACHE_CACHE", str(tmp_path / "another machine"))
    events: list[dict[str, object]] = []
    job.carry_out(events.append)
    starts = [event["step"] for event in events if event.get("event") == "start"]
    assert starts == [6]
    assert history(job) == history(job_of(local, str(tmp_path / "local")))
    assert {path.url.split("/")[-2] for path in job.output.find()} == {"two-machines"}


@pytest.mark.slow
def test_heads_that_lie_beside_a_table_are_found(
    local: TinyRecipe, root: str, tmp_path: Path
) -> None:
    """The table ``exact`` has its language-model head beside its shards."""
    body = yaml.safe_load(local.path.read_text())
    body["steps"]["signals"]["encoding"] = {"kind": "exact"}
    del body["steps"]["measured"]
    path = tmp_path / "exact.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    recipes = TinyRecipe(path, local.root), on_store(TinyRecipe(path, local.root), root, tmp_path)
    for recipe in recipes:
        recipe.run()
    assert tables(recipes[0]) == tables(recipes[1])
    assert losses(recipes[0].step("trained")) == losses(recipes[1].step("trained")) != []
    assert teachercache("verify", root).code == 0
    head = recipes[1].step("signals").place / "head.json"
    assert isinstance(head, ObjectPath)
    head.unlink()
    said = teachercache("verify", root)
    assert said.code == 1 and f"{head} is missing" in said.out


@pytest.mark.slow
def test_students_in_two_processes_and_by_a_model_of_the_store(
    local: TinyRecipe, root: str, tmp_path: Path
) -> None:
    """A trained student is the model of a later step; two processes share one working folder."""
    body = yaml.safe_load(local.path.read_text())
    del body["steps"]["measured"]
    body["steps"]["own"] = {
        "stage": "teacher_logits",
        "input": "documents",
        "model": "trained",
        "encoding": {"kind": "top_k", "k": 4},
    }
    body["models"]["trained"] = {"step": "trained", "dtype": "float32", "engine": "transformers"}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    recipes = TinyRecipe(path, local.root), on_store(TinyRecipe(path, local.root), root, tmp_path)
    recipes[0].run()
    recipes[1].run("execution.training_processes=2")
    trained = losses(recipes[1].step("trained"))
    assert trained == pytest.approx(losses(local.step("trained")), rel=1e-4)
    assert set(tables(recipes[1])) == {"documents", "signals", "own"}
    assert teachercache("verify", root).code == 0


@pytest.mark.slow
def test_a_store_is_the_root_of_a_run_on_ray(
    local: TinyRecipe, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in RAY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    recipe = on_store(local, root, tmp_path, "documents", "signals", "student", "trained")
    recipe.run("execution.executor=ray", "execution.workers=2")
    assert tables(recipe) == tables(local)
    assert losses(recipe.step("trained")) == pytest.approx(losses(local.step("trained")), rel=1e-4)


@pytest.mark.slow
def test_a_model_from_the_store_has_the_whole_tokenizer(
    tiny_model: Path, paragraphs: list[str], root: str, tmp_path: Path
) -> None:
    """Also the templates that lie in a folder of their own."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / TEMPLATE_FOLDER).mkdir()
    (model / TEMPLATE_FOLDER / "tools.jinja").write_text("{{ messages }}")
    assert tokenizer_fingerprint(model) != tokenizer_fingerprint(tiny_model)
    recipe = make_recipe(tmp_path, model, paragraphs[:4], more_steps=STUDENTS)
    stored = on_store(recipe, root, tmp_path, "student")
    stored.run()
    copy = local_copy(stored.step("student").place)
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(model)


@pytest.mark.slow
def test_a_finished_root_may_be_copied_either_way(
    local: TinyRecipe, root: str, server: Server, tmp_path: Path
) -> None:
    """By a tool that knows nothing of us, and stores no checksum with an object."""
    files = [path for path in local.root.rglob("*") if path.is_file()]
    server.put_files(root, local.root, files)
    stored = on_store(local, root, tmp_path)
    assert set(stored.run().states.values()) == {"done"}
    rows = open_dataset([str(stored.step(name).place) for name in ("documents", "signals")])
    assert len(rows) == sum(m.num_rows for m in rows.manifests[:1])
    copy = TinyRecipe(tmp_path / "copy.yaml", tmp_path / "copy")
    copy.path.write_text(local.path.read_text().replace(str(local.root), str(copy.root)))
    for key, body in server.objects(root).items():
        path = copy.root / key.removeprefix("cache/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    assert set(copy.run().states.values()) == {"done"}
    assert teachercache("verify", copy.root).code == 0


@pytest.mark.slow
def test_groups_of_shards_on_a_store_then_the_step_are_one_run(
    local: TinyRecipe, root: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = on_store(local, root, tmp_path, "documents", "signals")
    assert teachercache("run", recipe.path, "--step", "documents").code == 0
    (signals,) = [
        step
        for step in json.loads(teachercache("plan", recipe.path, "--json").out)
        if step["name"] == "signals"
    ]
    middle = signals["num_shards"] // 2
    groups = (f"0:{middle}", f"{middle}:{signals['num_shards']}")
    one_step = ("run", recipe.path, "--step", "signals")
    for child in [start(*one_step, "--shards", group) for group in groups]:
        said = finish(child)
        assert said.code == 0, said.err
    place = recipe.step("signals").place
    assert not (place / "manifest.json").is_file()
    events = recipe.run()
    assert events.made == [] and tables(recipe) == {
        name: found for name, found in tables(local).items() if name in ("documents", "signals")
    }
    # A group asks for its own shards and no others, however many the step has.
    (place / "manifest.json").unlink()
    with faulty_proxy(server) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        assert teachercache(*one_step, "--shards", "0:1").code == 0
    use_endpoint(monkeypatch, server.url)
    of_shards = [path for _, path in proxy.seen if f"{place.name}/shard-" in path]
    assert {path.split("shard-")[1][:5] for path in of_shards} == {"00000"}
    # While a whole run has the step, a group of its shards is refused.
    with step_lock(place):
        said = teachercache(*one_step, "--shards", groups[0])
    assert said.code == 1 and "is being written by a run of the whole step" in said.error
    assert not [key for key in server.objects(root) if LOCK_FILE in key]


@pytest.mark.slow
def test_tables_of_a_store_are_audited(
    local: TinyRecipe, server: Server, root: str, tmp_path: Path
) -> None:
    """Shards and an exact table's head are fetched as they are read; the verdict goes there too."""
    states = {
        "stage": "teacher_logits",
        "input": "documents",
        "model": "teacher",
        "encoding": {"kind": "exact"},
    }
    recipe = on_store(local, root, tmp_path, "documents", "signals")
    body = yaml.safe_load(recipe.path.read_text())
    body["steps"]["states"] = states
    recipe.path.write_text(yaml.safe_dump(body, sort_keys=False))
    recipe.run()
    said = teachercache("audit", recipe.path, "--engine", "transformers", "--rows", "8")
    assert said.code == 0 and said.out.count(": faithful, ") == 2, said.out + said.err
    for name in ("signals", "states"):
        folder = recipe.step(name).place
        verdict = verdict_of(folder, read_manifest(folder).dataset_id)
        assert verdict is not None and verdict.num_rows == 8
