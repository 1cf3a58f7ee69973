"""Optimizers of a run: what each holds in memory, resume, and a package that is not installed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigError
from stages.student import packages
from stages.student.options import TrainOptions
from stages.student.train.arguments import training_arguments
from stages.student.train.stage import TrainConfig
from stages.student.train.work import TrainResult, train
from tests.fixtures.cached_data import CachedData, make_cached_data
from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe, teachercache

OPTIONS = TrainOptions(num_workers=0, log_every=1, checkpoint_every=3)
CONFIG = TrainConfig(max_steps=8, lr=3e-3, per_device_batch_size=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


def run(data: CachedData, output: Path, optimizer: str, **more: Any) -> TrainResult:
    config = TrainConfig.model_validate(CONFIG.model_dump() | {"optimizer": optimizer})
    tables = data.tables("threshold")
    return train(config, student=data.student, data=tables, output=output, options=OPTIONS, **more)


class Stopped(Exception):
    """What a test throws from ``on_event`` to stop a run."""


def stop_at_seven(event: dict[str, Any]) -> None:
    if event["event"] == "step" and event["step"] == 7:
        raise Stopped


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.slow
def test_an_optimizer_holds_what_the_guide_says(
    data: CachedData, tmp_path: Path, optimizer: str
) -> None:
    """AdamW two numbers a weight; Adafactor one a row and one a column of each matrix."""
    whole = run(data, tmp_path / "whole", optimizer)
    with pytest.raises(Stopped):
        run(data, tmp_path / "out", optimizer, on_event=stop_at_seven)
    kept = tmp_path / "out" / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    states = torch.load(kept, weights_only=True)["state"].values()
    tensors = [value for state in states for value in state.values() if torch.is_tensor(value)]
    held = sum(tensor.numel() for tensor in tensors if tensor.ndim)
    shapes = [p.shape for p in AutoModelForCausalLM.from_pretrained(data.student).parameters()]
    weights = sum(shape.numel() for shape in shapes)
    sums = sum(sum(shape) for shape in shapes)  # of a vector: one number each
    assert held == (2 * weights if optimizer == "adamw" else sums)
    resumed = run(data, tmp_path / "out", optimizer)
    assert [e["loss"] for e in resumed.history] == [e["loss"] for e in whole.history]
    assert whole.history[-1]["loss"] < whole.history[0]["loss"]


def test_optimizers_have_names_of_their_own_and_adamw_has_none(tmp_path: Path) -> None:
    assert "optimizer" not in CONFIG.settings()
    assert (
        CONFIG.model_copy(update={"optimizer": "adafactor"}).settings()["optimizer"] == "adafactor"
    )
    assert training_arguments(CONFIG, OPTIONS, tmp_path).optim == "adamw_torch_fused"
    with pytest.raises(ValidationError, match="'adamw', 'adafactor' or 'adamw_8bit'"):
        TrainConfig.model_validate({"max_steps": 1, "optimizer": "sgd"})


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_adamw_of_eight_bits_learns(data: CachedData, tmp_path: Path) -> None:
    result = run(data, tmp_path / "out", "adamw_8bit")
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.fixture
def recipe(tiny_model: Path, paragraphs: list[str], tmp_path: Path) -> TinyRecipe:
    steps = {
        "trained": {"stage": "train", "student": "teacher", "data": ["documents", "signals"]}
        | {"max_steps": 1, "optimizer": "adamw_8bit"}
    }
    return make_recipe(tmp_path, tiny_model, paragraphs[:12], more_steps=steps)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)


@pytest.mark.usefixtures("nothing_installed", "own_cache")
def test_a_missing_package_is_named_before_anything_runs(
    recipe: TinyRecipe, data: CachedData, tmp_path: Path
) -> None:
    said = teachercache("run", recipe.path)
    assert said.code == 2 and not recipe.root.exists()
    assert said.error == (
        "steps.trained: optimizer: adamw_8bit needs the package bitsandbytes, which is not "
        "installed: install bitsandbytes, or choose otherwise"
    )
    with pytest.raises(ConfigError, match="needs the package bitsandbytes"):
        run(data, tmp_path / "out", "adamw_8bit")
