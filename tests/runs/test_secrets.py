"""Planted secrets: whatever runs and whatever fails, no file of a root and no output holds one."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline.executors.ray_cluster import job as ray_job
from tests.fixtures.tiny_recipe import (
    COMMAND,
    EVERY_KIND,
    TinyRecipe,
    edit_recipe,
    environment,
    make_recipe,
    start_installed,
    teachercache,
)

MARK = "pl4nted"
SECRETS = {
    "HF_TOKEN": f"hf_{MARK}HubTokenOfTheEnvironment",
    "AWS_ACCESS_KEY_ID": f"AKIA{MARK}",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}/secret+key",
    "AWS_SESSION_TOKEN": f"{MARK}-session",
    "WANDB_API_KEY": f"{MARK}-wandb",
    "RAY_AUTH_TOKEN": f"{MARK}-ray",
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Secrets in the environment, and a token where huggingface_hub keeps it."""
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "token").write_text(f"hf_{MARK}HubTokenOfTheCache")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HOME", str(hub))
    monkeypatch.setenv("HF_TOKEN_PATH", str(hub / "token"))
    return hub


def leaks(*folders: Path) -> list[str]:
    """Every file that holds a secret, as text or inside an Arrow or JSON file."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if MARK.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_run_of_every_kind_of_step_leaves_no_secret(
    planted: Path,
    tiny_model: Path,
    paragraphs: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    recipe = make_recipe(tmp_path / "r", tiny_model, paragraphs[:40], more_steps=EVERY_KIND)
    edit_recipe(recipe, "execution", "report_to", value=["tensorboard"])
    said = [teachercache("run", recipe.path)]
    assert said[0].code == 0, said[0].err
    for command in (["plan"], ["plan", "--json"], ["status", "--json"], ["show"]):
        said.append(teachercache(command[0], recipe.path, *command[1:]))
    said.append(teachercache("ls", recipe.root))
    exported = tmp_path / "exported"
    folders = [recipe.step(name).folder for name in ("documents", "signals")]
    data = [word for folder in folders for word in ("--data", folder)]
    said.append(teachercache("export", exported, "--to", "parquet-sampled", *data))
    assert not [one.err for one in said if one.code]
    kinds = {path.suffix for path in recipe.root.rglob("*") if path.is_file()}
    assert {".arrow", ".json", ".feather", ".safetensors"} <= kinds
    assert list(recipe.root.rglob("*tfevents*"))
    assert not leaks(recipe.root, exported)
    told = capfd.readouterr()
    assert MARK not in "".join(one.out + one.err for one in said) + told.out + told.err
    assert MARK not in caplog.text


def refused(recipe: TinyRecipe, *overrides: str) -> str:
    words = [word for override in overrides for word in ("--set", override)]
    said = teachercache("run", recipe.path, *words)
    assert said.code in (1, 2), said.err
    assert MARK not in said.out + said.err
    return said.error


def test_what_fails_does_not_repeat_a_secret(
    planted: Path, tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path / "r", tiny_model, paragraphs[:10])
    url = f"https://me:{MARK}@host/x"
    assert "***" in refused(recipe, f"execution.root=s3://KEY:{MARK}@bucket/x")
    assert "***@host" in refused(recipe, f"steps.documents.source.paths=['{url}/*.jsonl']")
    assert "***@host" in refused(
        recipe, f"models.teacher.path={url}", "models.teacher.revision=main"
    )
    assert "***@host" in refused(recipe, f"steps.documents.length={url}")
    assert "***@host" in refused(recipe, f"steps.signals.input={url}")
    assert "***@host" in refused(recipe, f"steps.documents.tokenizer={url}")
    assert "***" in refused(recipe, "steps.documents.length=${AWS_SECRET_ACCESS_KEY}")
    assert not leaks(tmp_path / "r")


def test_a_store_that_does_not_answer_is_told_without_credentials(
    planted: Path,
    tiny_model: Path,
    paragraphs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://KEY:{MARK}@127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:10])
    said = teachercache("run", recipe.path, "--set", "execution.root=s3://bucket/x")
    assert said.code in (1, 2) and MARK not in said.out + said.err
    assert "s3://bucket/x" in said.error


def test_a_fault_of_ours_is_told_whole_but_for_secrets(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*arguments: Any) -> None:
        raise RuntimeError(f"lost https://me:{MARK}@host and {SECRETS['WANDB_API_KEY']}")

    monkeypatch.setattr("pipeline.planning.recipe_file.load_recipe", breaks)
    said = teachercache("plan", tmp_path / "recipe.yaml")
    assert said.code == 1 and MARK not in said.out + said.err
    assert "Traceback" in said.err
    assert said.err.endswith("RuntimeError: lost https://***@host and ***\n")


def test_a_job_of_ray_takes_the_recipe_along_and_nothing_of_the_environment(
    planted: Path,
    tiny_model: Path,
    paragraphs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    class Client:
        def submit_job(self, **job: Any) -> str:
            folder = Path(job["runtime_env"]["working_dir"])
            asked.update(job, files={p.name: p.read_text() for p in folder.rglob("*")})
            raise KeyboardInterrupt

    monkeypatch.setattr(ray_job, "job_client", lambda address: Client())
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:10])
    with pytest.raises(KeyboardInterrupt):
        ray_job.submit_recipe(recipe.load(), "http://127.0.0.1:1", None)  # type: ignore[arg-type]
    assert set(asked["runtime_env"]) == {"working_dir"}
    assert list(asked["files"]) == ["recipe.yaml"]
    assert MARK not in json.dumps(asked, default=str)


@pytest.mark.slow
def test_an_installed_command_in_a_process_of_its_own(
    planted: Path, tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    """Several workers, each of which is handed its work through a pipe."""
    assert COMMAND.is_file()
    recipe = make_recipe(tmp_path / "r", tiny_model, paragraphs[:30])
    edit_recipe(recipe, "execution", "workers", value=2)
    command = start_installed("run", recipe.path, **{**SECRETS, "HF_HUB_VERBOSITY": "debug"})
    out, err = command.communicate(timeout=300)
    assert command.returncode == 0, err
    assert environment(**SECRETS)["HF_TOKEN"] == SECRETS["HF_TOKEN"]
    assert MARK not in out + err and not leaks(tmp_path / "r")
