"""The distiller and its frozen reader against the same maths written plainly in float64."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.errors import ConfigError, IdentityMismatch, StoreError
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.models.spec import ModelSpec
from stages.stage import StepJob
from stages.student.distiller.distiller import distiller_of, load_distiller
from stages.student.distiller.reader import check_reader, load_reader, read_hidden_states
from stages.student.distiller.stage import DistillerInitStage
from tests.conftest import save_tiny_model
from tests.fixtures.cached_data import save_model
from tests.fixtures.demonstration_data import MendModels, SlowMend, cut, kept, make_models

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[32, 24], ids=["equal_widths", "projection"])
def models(request: Any, tmp_path_factory: pytest.TempPathFactory) -> MendModels:
    return make_models(tmp_path_factory.mktemp("mend"), distiller_width=request.param)


def padded(rows: list[np.ndarray[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Token ids on the left, a real token as padding, and the number of each."""
    lengths = [len(ids) for ids in rows]
    ids_BL = np.full((len(rows), max(lengths)), 9)
    for b, ids in enumerate(rows):
        ids_BL[b, : len(ids)] = ids
    return torch.from_numpy(ids_BL), torch.tensor(lengths)


def test_vectors_and_what_is_read_after_them_are_those_of_single_rows(models: MendModels) -> None:
    """Rows of several lengths in one batch; padding reaches nothing."""
    rows = kept(cut("episodes"))[:5]
    distiller = load_distiller(models.distiller, device=CPU).double().eval()
    reader = load_reader(models.teacher, device=CPU, dtype=torch.float64)
    slow = SlowMend(models)
    with torch.no_grad():
        vectors_BMR = distiller(*padded([row.distiller_ids_L for row in rows]))
        queries_BQ, lengths_B = padded([row.input_ids_T[row.query_start :] for row in rows])
        hidden_BQR = read_hidden_states(reader, vectors_BMR, queries_BQ)
        for row, vectors_MR, hidden_QR, length in zip(
            rows, vectors_BMR, hidden_BQR, lengths_B.tolist(), strict=True
        ):
            torch.testing.assert_close(vectors_MR, slow.vectors(row), rtol=1e-9, atol=1e-9)
            found_PV = reader.lm_head(hidden_QR[: length - 1]).log_softmax(-1)
            torch.testing.assert_close(found_PV, slow.logprobs(row), rtol=1e-9, atol=1e-9)


def test_gradient_reaches_the_distiller_and_not_the_reader(models: MendModels) -> None:
    (row, *_) = kept(cut("episodes"))
    distiller = load_distiller(models.distiller, device=CPU).train()
    reader = load_reader(models.teacher, device=CPU, dtype=torch.float32)
    vectors_BMR = distiller(*padded([row.distiller_ids_L]))
    queries_BQ, _ = padded([row.input_ids_T[row.query_start :]])
    total: Any = read_hidden_states(reader, vectors_BMR, queries_BQ).square().sum()
    total.backward()
    found = {name: parameter.grad for name, parameter in distiller.named_parameters()}
    assert "prompt_embeddings_MD" in found
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in found.values())
    assert not reader.training
    assert all(p.grad is None and not p.requires_grad for p in reader.parameters())


def test_saved_and_loaded_it_gives_the_same_logits(models: MendModels, tmp_path: Path) -> None:
    (row, *_) = kept(cut("episodes"))
    distiller = load_distiller(models.distiller, device=CPU).eval()
    distiller.save_pretrained(tmp_path / "again")
    again = load_distiller(tmp_path / "again", device=CPU).eval()
    reader = load_reader(models.teacher, device=CPU, dtype=torch.float32)
    shown, (queries_BQ, _) = padded([row.distiller_ids_L]), padded([row.input_ids_T[-4:]])
    with torch.no_grad():
        expected, found = (
            reader.lm_head(read_hidden_states(reader, one(*shown), queries_BQ))
            for one in (distiller, again)
        )
    assert torch.equal(expected, found)
    for name in ("config.json", "model.safetensors"):
        first, second = (folder / name for folder in (models.distiller, tmp_path / "again"))
        assert first.read_bytes() == second.read_bytes()


def test_prompt_embeddings_begin_as_rows_of_the_vocabulary(models: MendModels) -> None:
    distiller = load_distiller(models.distiller, device=CPU)
    rows_VD = distiller.get_input_embeddings().weight
    found = [
        (rows_VD == one_D).all(dim=1).nonzero().item() for one_D in distiller.prompt_embeddings_MD
    ]
    assert len(set(found)) == 3 and min(found) >= 100


def make(models: MendModels, output: Path, **settings: Any) -> None:
    """Run the stage as a recipe does."""
    places = {"small": models.teacher.parent / "small", "reader": models.teacher}
    specs = {name: ModelSpec(path, "float32", "transformers", 32) for name, path in places.items()}
    body = {"stage": "distiller_init", "model": "small", "reader": "reader", "num_vectors": 3}
    stage = DistillerInitStage.model_validate(body | settings)
    output.mkdir()
    stage.make(StepJob(output, "f" * 64, {}, (), specs, print, print))


def test_the_stage_makes_the_same_bytes_every_time(models: MendModels, tmp_path: Path) -> None:
    for name in ("first", "second"):
        make(models, tmp_path / name)
    record = read_checkpoint(tmp_path / "first")
    assert record is not None and record == read_checkpoint(tmp_path / "second")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(record.files)
    distiller = load_distiller(tmp_path / "first", device=CPU)
    reader = load_reader(models.teacher, device=CPU, dtype=torch.float32)
    check_reader(distiller, reader, models.teacher)
    make(models, tmp_path / "third", seed=1)
    third = read_checkpoint(tmp_path / "third")
    assert third is not None
    assert third.files["model.safetensors"] != record.files["model.safetensors"]


def test_what_cannot_work_is_one_line(models: MendModels, tmp_path: Path) -> None:
    small = models.teacher.parent / "small"
    with pytest.raises(ConfigError, match=r"num_vectors is 400, the vocabulary of .* has 307 rows"):
        distiller_of(small, num_vectors=400, reader_hidden_size=32, reader="r", seed=0)
    with pytest.raises(ConfigError, match="holds llama, expected a distiller"):
        load_distiller(small, device=CPU)
    with pytest.raises(ConfigError, match="holds no model, expected a distiller"):
        load_distiller(tmp_path, device=CPU)
    save_model(tmp_path / "other", seed=9, num_layers=1)
    reader = load_reader(tmp_path / "other", device=CPU, dtype=torch.float32)
    distiller = load_distiller(models.distiller, device=CPU)
    with pytest.raises(ConfigError, match="the distiller was made for reader"):
        check_reader(distiller, reader, tmp_path / "other")
    save_tiny_model(tmp_path / "strange", vocab_size=512)
    strange = MendModels(tmp_path / "strange", models.distiller)
    (tmp_path / "small").symlink_to(small)
    with pytest.raises(IdentityMismatch, match="make the distiller of a model with the reader's"):
        make(strange, tmp_path / "output")


@pytest.mark.parametrize(
    ("model", "reader", "message"),
    [
        (64, 128, "num_vectors is 70, and 'small' reads 64 tokens at once: .* demonstrations bef"),
        (128, 64, "num_vectors is 70, and 'reader' reads 64 tokens at once: .* a query after"),
    ],
)
def test_vectors_that_fill_a_window_are_refused(
    models: MendModels, tmp_path: Path, model: int, reader: int, message: str
) -> None:
    """Of the model, which reads demonstrations before them, and of the reader."""
    for name, window in (("small", model), ("teacher", reader)):
        copytree(models.teacher.parent / name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["max_position_embeddings"] = window
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        make(MendModels(tmp_path / "teacher", models.distiller), tmp_path / "out", num_vectors=70)


def test_a_reader_may_have_another_chat_template(models: MendModels, tmp_path: Path) -> None:
    """Its ids are those of the distiller's model, whatever is put around them."""
    copytree(models.teacher, tmp_path / "instruct")
    (tmp_path / "instruct" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "small").symlink_to(models.teacher.parent / "small")
    make(MendModels(tmp_path / "instruct", models.distiller), tmp_path / "output")
    assert read_checkpoint(tmp_path / "output") is not None


def test_rows_that_no_token_uses_are_no_beginning(tmp_path: Path) -> None:
    """Of a matrix of 400 rows 307 are tokens'; all from 100 on are drawn."""
    save_model(tmp_path / "small", seed=3, num_layers=1, rows=400)
    settings: dict[str, Any] = {"reader_hidden_size": 32, "reader": "r", "seed": 0}
    distiller = distiller_of(tmp_path / "small", num_vectors=207, **settings)
    rows_VD = distiller.get_input_embeddings().weight[100:307]
    drawn, expected = (
        {tuple(row) for row in rows.tolist()} for rows in (distiller.prompt_embeddings_MD, rows_VD)
    )
    assert drawn == expected
    with pytest.raises(ConfigError, match=r"num_vectors is 308, the vocabulary of .* has 307 rows"):
        distiller_of(tmp_path / "small", num_vectors=308, **settings)


def test_a_damaged_step_is_no_distiller_and_no_reader(models: MendModels, tmp_path: Path) -> None:
    make(models, tmp_path / "made")
    weights = tmp_path / "made" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(StoreError, match="this model is not the one that was made"):
        load_distiller(tmp_path / "made", device=CPU)
    with pytest.raises(StoreError, match="this model is not the one that was made"):
        load_reader(tmp_path / "made", device=CPU, dtype=torch.float32)
