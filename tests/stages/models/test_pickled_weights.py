"""Weights in a ``.bin``: tensors are read, objects of other classes are refused and never made."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from schemas.errors import TeacherCacheError
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.causal_lm.model import load_student
from tests.conftest import PARAGRAPHS
from tests.fixtures.tiny_recipe import make_recipe, teachercache


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def weights(tiny_model: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    found: dict[str, torch.Tensor] = load_file(file)
    file.unlink()
    return found


def test_tensors_in_a_bin_are_read(
    weights: dict[str, torch.Tensor], tiny_model: Path, tmp_path: Path
) -> None:
    torch.save(weights, tmp_path / "model" / "pytorch_model.bin")
    found, expected = (
        LanguageHead.from_model_folder(folder, device="cpu", dtype=torch.float32)
        for folder in (tmp_path / "model", tiny_model)
    )
    assert torch.equal(found.weight_VD, expected.weight_VD)


@pytest.mark.parametrize("split", [False, True], ids=["one file", "an index of files"])
def test_an_object_of_another_class_is_refused_in_one_line(
    weights: dict[str, torch.Tensor], tmp_path: Path, split: bool
) -> None:
    model, marker = tmp_path / "model", tmp_path / "marker"
    file = model / ("part-1.bin" if split else "pytorch_model.bin")
    torch.save({**weights, "more": Marker(marker)}, file)
    if split:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file.name)}
        (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    recipe = make_recipe(tmp_path / "recipe", model, PARAGRAPHS[300:306])
    said = teachercache("run", recipe.path)
    assert said.code == 2 and said.error.startswith(str(model)), said.err
    assert "hold objects that are no tensors" in said.error
    for opens in (
        lambda: LanguageHead.from_model_folder(model, device="cpu", dtype=torch.float32),
        lambda: load_student(model, device=torch.device("cpu")),
    ):
        with pytest.raises(TeacherCacheError) as error:
            opens()
        assert "\n" not in str(error.value)
    assert not marker.exists()
    torch.load(file, weights_only=False)  # the object would have written it
    assert marker.exists()
