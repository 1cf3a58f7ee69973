"""How a student's attention is computed: the same numbers by each way there is, or one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers.models.llama import modeling_llama

from schemas.errors import ConfigError
from stages.student import packages
from stages.student.options import TrainOptions
from stages.student.train.arguments import training_arguments
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train
from tests.fixtures.cached_data import CachedData, make_cached_data

OPTIONS = TrainOptions(device="cpu", num_workers=0, log_every=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


def config_of(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"max_steps": 4, "per_device_batch_size": 4} | values)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.slow
def test_eager_attention_gives_the_numbers_of_sdpa(
    data: CachedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    calls = []
    eager = modeling_llama.eager_attention_forward

    def counted(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        return eager(*arguments, **more)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", counted)
    found = {}
    for name in ("sdpa", "eager"):
        config = config_of(attn_implementation=name, packing=packing)
        tables = data.tables("threshold")
        output = tmp_path / name
        result = train(config, student=data.student, data=tables, output=output, options=OPTIONS)
        found[name] = [entry["loss"] for entry in result.history]
        assert bool(calls) == (name == "eager")
        saved = json.loads((output / "config.json").read_text())
        assert not [key for key in saved if "attn" in key]
    assert found["eager"] == pytest.approx(found["sdpa"], rel=1e-5)


def test_what_cannot_be_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = {"attn_implementation": "flash_attention_2"}
    with pytest.raises(ValidationError, match="takes no float32: set dtype to bfloat16"):
        config_of(**flash)
    with pytest.raises(ValidationError, match="a distiller, which has sdpa alone"):
        config_of(attn_implementation="eager", objective={"loss": "mend"})
    with pytest.raises(ConfigError, match="flex_attention trains on a GPU alone"):
        training_arguments(config_of(attn_implementation="flex_attention"), OPTIONS, tmp_path)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    for name, module in (("2", "flash_attn"), ("3", "flash_attn_interface")):
        config = config_of(attn_implementation=f"flash_attention_{name}", dtype="bfloat16")
        with pytest.raises(ConfigError, match=f"needs the package {module}, which is not"):
            training_arguments(config, OPTIONS, tmp_path)
    assert "attn_implementation" not in config_of().settings()
