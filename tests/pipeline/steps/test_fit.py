"""Runs that cannot fit are refused in one line, before anything is made, unless told otherwise."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.steps import fit
from pipeline.steps.fit import Memory, devices_of, left_bytes, num_parameters
from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe, teachercache


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(scope="module")
def begun(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    """A recipe whose documents are finished."""
    recipe = make_recipe(tmp_path_factory.mktemp("fit"), tiny_model, paragraphs[:40])
    assert teachercache("run", recipe.path, "--step", "documents").code == 0
    return recipe


def disk_with(free: int) -> Callable[[Any], Usage]:
    return lambda path: Usage(1 << 40, (1 << 40) - free, free)


@pytest.mark.slow
def test_bytes_that_the_disk_has_not_are_refused_unless_overridden(
    begun: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = begun.copy(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", disk_with(1000))
    said = teachercache("run", recipe.path)
    assert said.code != 0
    assert said.error.startswith("step 'signals' needs about 0.")
    assert "only 0.0 MB are free" in said.error and said.error.endswith("--no-fit-check")
    assert not recipe.step("signals").folder.exists()
    assert teachercache("run", recipe.path, "--no-fit-check").code == 0
    assert teachercache("run", recipe.path).code == 0  # nothing is left to be made


@pytest.mark.slow
def test_shards_that_are_there_already_need_no_room(
    begun: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = begun.copy(tmp_path)
    step = recipe.step("signals")
    whole = left_bytes(step)
    shards = len(list(recipe.step("documents").folder.glob("*.arrow")))
    made = teachercache("run", recipe.path, "--step", "signals", "--shards", f"0:{shards - 1}")
    assert made.code == 0, made.err
    left = left_bytes(step)
    assert left == pytest.approx(whole / shards, abs=2)
    monkeypatch.setattr(shutil, "disk_usage", disk_with(left - 1))
    assert teachercache("run", recipe.path).code != 0
    monkeypatch.setattr(shutil, "disk_usage", disk_with(left))
    assert teachercache("run", recipe.path).code == 0


def test_an_input_that_has_just_been_finished_is_judged_before_what_reads_it(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:40])
    monkeypatch.setattr(shutil, "disk_usage", disk_with(1000))
    said = teachercache("run", recipe.path)
    assert "step 'signals' needs" in said.error
    assert (recipe.step("documents").folder / "manifest.json").is_file()


@pytest.mark.slow
def test_weights_that_the_memory_has_not_are_refused_unless_overridden(
    begun: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = begun.copy(tmp_path)
    monkeypatch.setattr(fit, "available_memory", lambda: 500_000)
    said = teachercache("run", recipe.path)
    assert said.error.startswith("steps.signals: model 'teacher' needs about 0.0 GB of memory")
    assert said.error.endswith("or run with --no-fit-check")
    monkeypatch.setattr(fit, "available_memory", lambda: 700_000)
    workers = teachercache("run", recipe.path, "--set", "execution.workers=2")
    assert "in each of 2 workers" in workers.error
    monkeypatch.setattr(fit, "available_memory", lambda: 500_000)
    assert teachercache("run", recipe.path, "--no-fit-check").code == 0


def test_a_system_that_does_not_say_what_is_free_refuses_nothing(
    begun: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = begun.copy(tmp_path)
    monkeypatch.setattr(fit, "available_memory", lambda: 0)
    assert teachercache("run", recipe.path).code == 0


def test_parameters_are_counted_by_the_size_of_the_weights(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters()
    assert num_parameters(tiny_model) == pytest.approx(real, rel=0.02)


def test_gpus_are_those_that_nvidia_smi_shows(
    begun: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "0, NVIDIA H200, 1000, 143771"\necho "$@" > "$0.asked"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    execution = begun.load("execution.engine.device=auto").execution
    assert devices_of(execution) == [Memory("GPU 0 (NVIDIA H200)", 1000 << 20, 143771 << 20)]
    assert "-i 0" in (tmp_path / "nvidia-smi.asked").read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert fit.devices_of(execution) == []
    assert devices_of(begun.load("execution.engine.device=cpu").execution) == []
