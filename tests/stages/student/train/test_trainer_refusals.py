"""What the trainer refuses, each in one readable line, before it spends a step."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.cache.verify import verify_folder
from schemas.errors import (
    ConfigError,
    IdentityMismatch,
    SchemaMismatch,
    StoreError,
    TeacherCacheError,
)
from schemas.storage.files import sha256_of
from schemas.storage.manifest import read_manifest, write_manifest
from schemas.storage.shards import read_shard
from stages.models.checkpoints.checkpoint import CheckpointRecord, write_checkpoint
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


def test_weights_that_the_last_step_breaks_are_not_kept(
    own_data: CachedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss is logged after the last step, so only the weights show it."""
    step = torch.optim.AdamW.step

    def broken(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        found = step(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data.flatten()[0] = float("nan")
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    once = CONFIG.model_copy(update={"max_steps": 1, "epochs": None})
    with pytest.raises(ConfigError, match=r"weight holds numbers that are not finite: lower lr"):
        train(
            once,
            student=own_data.student,
            data=own_data.tables("threshold"),
            output=tmp_path / "out",
        )
    assert not (tmp_path / "out" / "checkpoint.json").exists()


def test_a_missing_student_is_one_readable_line(data: CachedData, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing does not exist: give the folder of a student"):
        evaluate(tmp_path / "nothing", data.tables("threshold"))


def rewritten(shard: Path, column: str, change: Any) -> None:
    """Change a column of a shard as a broken writer would: its new sha256 is in the list."""
    content = read_shard(shard)
    index = content.schema.get_field_index(column)
    values = content[column].combine_chunks()
    content = content.set_column(index, content.schema.field(index), change(values))
    with pa.ipc.new_file(str(shard), content.schema) as out:
        for batch in content.to_batches(max_chunksize=16):
            out.write_batch(batch)
    manifest = read_manifest(shard.parent)
    changes = {"num_bytes": shard.stat().st_size, "sha256": sha256_of(shard)}
    shards = [
        replace(record, **changes) if record.file == shard.name else record  # type: ignore[arg-type]
        for record in manifest.shards
    ]
    write_manifest(shard.parent, replace(manifest, shards=tuple(shards)))


def test_rows_that_their_own_bytes_contradict_end_training_in_one_line(
    own_data: CachedData, tmp_path: Path
) -> None:
    """A head code of 200, of 64 levels."""
    shard = own_data.root / "threshold" / "shard-00000-of-00003.arrow"

    def code_of_200(values: pa.ListArray) -> pa.ListArray:
        codes = values.values.to_numpy().copy()
        codes[3] = 200
        child = pa.array(codes, values.type.value_type)
        return pa.ListArray.from_arrays(values.offsets, child, type=values.type)

    rewritten(shard, "head_codes_E", code_of_200)
    said = r"shard-00000-of-00003\.arrow row 0 \(sample .*head_codes_E holds 200, expected 0 to 63"
    for workers in (0, 1):
        options = replace(OPTIONS, num_workers=workers)
        with pytest.raises(StoreError, match=said) as caught:
            train(
                CONFIG,
                student=own_data.student,
                data=own_data.tables("threshold"),
                output=tmp_path / str(workers),
                options=options,
            )
        assert "\n" not in str(caught.value) and caught.value.exit_code == 1


def test_token_ids_that_are_not_those_of_their_sample_id_end_training(
    own_data: CachedData, tmp_path: Path
) -> None:
    def other_token(values: pa.ListArray) -> pa.ListArray:
        ids = values.values.to_numpy().copy()
        ids[0] ^= 1
        child = pa.array(ids, values.type.value_type)
        return pa.ListArray.from_arrays(values.offsets, child, type=values.type)

    rewritten(own_data.documents / "shard-00000-of-00003.arrow", "input_ids_T", other_token)
    with pytest.raises(
        StoreError, match=r"documents/shard-.*sample_id does not name its token ids"
    ):
        train(
            TrainConfig(max_steps=2, objective={"loss": "cross_entropy"}),
            student=own_data.student,
            data=[own_data.documents],
            output=tmp_path / "out",
            options=OPTIONS,
        )


def test_a_student_that_is_not_the_one_of_its_record_is_refused(
    own_data: CachedData, tmp_path: Path
) -> None:
    """All its weights are zero now, which loads as well as ever."""
    write_checkpoint(own_data.student, CheckpointRecord(fingerprint="f", identity={}))
    run(own_data, tmp_path / "sound")
    weights = own_data.student / "model.safetensors"
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    said = r"model\.safetensors has changed since it was written \(1 in all\).*delete .*student"
    with pytest.raises(StoreError, match=said) as caught:
        run(own_data, tmp_path / "out")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    with pytest.raises(StoreError, match=said):
        evaluate(own_data.student, own_data.tables("threshold"))
    (line,) = verify_folder(own_data.student)
    assert "model.safetensors has changed since it was written" in line
