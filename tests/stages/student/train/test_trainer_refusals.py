"""What the trainer refuses, each in one readable line, before it spends a step."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from schemas.errors import (
    ConfigError,
    IdentityMismatch,
    SchemaMismatch,
    StoreError,
    TeacherCacheError,
)
from schemas.storage.manifest import read_manifest, write_manifest
from stages.student.evaluate.positions import evaluate
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train
from tests.fixtures.cached_data import VOCAB_SIZE, CachedData, make_cached_data

CONFIG = TrainConfig(max_steps=2, per_device_batch_size=4)
OPTIONS = TrainOptions(num_workers=0, log_every=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def own_data(data: CachedData, tmp_path: Path) -> CachedData:
    """A copy that a test may damage."""
    shutil.copytree(data.root, tmp_path / "own")
    root = tmp_path / "own"
    return CachedData(root, root / "teacher", root / "student")


def run(data: CachedData, output: Path, **more: Any) -> None:
    tables = data.tables("threshold")
    train(CONFIG, student=data.student, data=tables, output=output, options=OPTIONS, **more)


def test_a_student_of_another_tokenizer_is_refused(own_data: CachedData, tmp_path: Path) -> None:
    """The vocabulary sizes agree; two ids are swapped."""
    path = own_data.student / "tokenizer.json"
    body = json.loads(path.read_text())
    body["model"]["vocab"] |= {"w1": 2, "w2": 1}
    path.write_text(json.dumps(body))
    with pytest.raises(IdentityMismatch, match=r"has tokenizer .*, .*documents was made with"):
        run(own_data, tmp_path / "out")
    with pytest.raises(IdentityMismatch, match="has tokenizer"):
        evaluate(own_data.student, own_data.tables("threshold"))


def test_a_base_student_trains_on_what_an_instruct_teacher_said(
    own_data: CachedData, tmp_path: Path
) -> None:
    """Chat template and end of text differ; tables of before name the whole tokenizer alone."""
    (own_data.teacher / "chat_template.jinja").write_text("{{ messages[0].content }}")
    path = own_data.student / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "w1"}))
    run(own_data, tmp_path / "out")
    for folder in own_data.tables("threshold"):
        write_manifest(folder, replace(read_manifest(folder), vocabulary=""))
    with pytest.raises(IdentityMismatch, match=r"delete manifest\.json there and run the recipe"):
        run(own_data, tmp_path / "other")


def test_a_student_with_too_few_rows_is_refused(own_data: CachedData, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(own_data.student)
    model.resize_token_embeddings(VOCAB_SIZE - 7)
    model.save_pretrained(own_data.student)
    with pytest.raises(IdentityMismatch, match="vocabulary of 300, the data's ids need 307"):
        run(own_data, tmp_path / "out")


def test_an_unfinished_table_is_refused(own_data: CachedData, tmp_path: Path) -> None:
    (own_data.root / "threshold" / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"is not finished: it has no manifest\.json"):
        run(own_data, tmp_path / "out")


def test_a_damaged_shard_is_refused(own_data: CachedData, tmp_path: Path) -> None:
    path = own_data.root / "threshold" / "shard-00001-of-00003.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"shard-00001-of-00003\.arrow has sha256"):
        run(own_data, tmp_path / "out")


def test_another_table_version_is_refused(own_data: CachedData, tmp_path: Path) -> None:
    folder = own_data.root / "threshold"
    write_manifest(folder, replace(read_manifest(folder), version=99))
    with pytest.raises(SchemaMismatch, match="version 99, this code reads version 1"):
        run(own_data, tmp_path / "out")


def test_signals_of_another_tokenizer_are_refused(own_data: CachedData, tmp_path: Path) -> None:
    folder = own_data.root / "threshold"
    write_manifest(folder, replace(read_manifest(folder), tokenizer="0" * 64, vocabulary=""))
    with pytest.raises(IdentityMismatch, match="make both with one tokenizer"):
        run(own_data, tmp_path / "out")


def test_distilling_without_a_teacher_table_is_refused(data: CachedData, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'kd' needs a teacher_logits table, the data has: docum"):
        train(CONFIG, student=data.student, data=[data.documents], output=tmp_path / "out")


def test_a_loss_that_is_not_a_number_stops_the_run(own_data: CachedData, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(own_data.student)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 3e38
    model.save_pretrained(own_data.student)
    with pytest.raises(TeacherCacheError, match=r"off by|the loss is (nan|inf) at step"):
        run(own_data, tmp_path / "out", heldout=False)


def test_a_missing_student_is_one_readable_line(data: CachedData, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load the student"):
        evaluate(tmp_path / "nothing", data.tables("threshold"))
