"""Names by content: what moves bytes moves a fingerprint, where and how wide a run is does not."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.planning.fingerprint import (
    canonical_json,
    fingerprint_of,
    hidden_size_of,
    model_identity,
    vocab_size_of,
)
from schemas.errors import ConfigError
from schemas.storage.files import sha256_of
from schemas.storage.remembered_sha256 import remembered_sha256
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.sources.documents.stage import IngestStage
from tests.fixtures.tiny_recipe import TinyRecipe, edit_recipe, error_of, make_recipe

STUDENT = {"stage": "student_init", "model": "teacher", "layers": 2}
TRAIN = {"stage": "train", "student": "student", "data": ["documents", "signals"], "max_steps": 1}


pytestmark = pytest.mark.usefixtures("own_cache")


@dataclass(frozen=True)
class Case:
    """A recipe of all four kinds of steps, and a model folder of its own to be changed."""

    recipe: TinyRecipe
    model: Path

    def prints(self, *overrides: str) -> dict[str, str]:
        return {step.name: step.fingerprint for step in self.recipe.plan(*overrides)}


@pytest.fixture
def case(tiny_model: Path, paragraphs: list[str], tmp_path: Path) -> Case:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    steps = {"student": STUDENT, "trained": TRAIN}
    return Case(make_recipe(tmp_path, model, paragraphs[:3], more_steps=steps), model)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads(path.read_text())
    edit(body)
    path.write_text(json.dumps(body))


def flip_a_weight_byte(model: Path) -> None:
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap_two_merges(body: dict[str, Any]) -> None:
    merges = body["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


ALL = {"documents", "signals", "student", "trained"}
MODEL_ONLY = ALL - {"documents"}


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        (flip_a_weight_byte, MODEL_ONLY),
        (
            lambda m: edit_json(m / "config.json", lambda b: b.update(rope_theta=5e5)),
            MODEL_ONLY,
        ),
        (lambda m: edit_json(m / "config.json", lambda b: b.update(vocab_size=600)), ALL),
        (lambda m: edit_json(m / "tokenizer.json", swap_two_merges), ALL),
        (
            lambda m: edit_json(m / "tokenizer_config.json", lambda b: b.update(eos_token="a")),
            ALL,
        ),
        (lambda m: (m / "chat_template.jinja").write_text("{{ messages }}"), ALL),
    ],
)
def test_the_model_is_part_of_the_name(
    case: Case, change: Callable[[Path], object], moved: set[str]
) -> None:
    before = case.prints()
    change(case.model)
    after = case.prints()
    assert {name for name in before if before[name] != after[name]} == moved


@pytest.mark.parametrize(
    ("override", "moved"),
    [
        ("models.teacher.dtype=bfloat16", MODEL_ONLY),
        ("models.teacher.engine=vllm", MODEL_ONLY),
        ("steps.signals.encoding.k=9", {"signals", "trained"}),
        ("steps.signals.encoding={kind: exact}", {"signals", "trained"}),
        ("steps.signals.seed=1", {"signals", "trained"}),
        ("steps.documents.source.column=body", {"documents", "signals", "trained"}),
        ("steps.documents.length=40", {"documents", "signals", "trained"}),
        ("steps.documents.rows_per_shard=9", {"documents", "signals", "trained"}),
        ("steps.documents.heldout_fraction=0.5", {"documents", "signals", "trained"}),
        ("steps.student.layers=[0]", {"student", "trained"}),
        ("steps.trained.lr=0.01", {"trained"}),
        ("steps.signals.max_rejected_fraction=0.5", set()),
        ("execution.workers=2", set()),
        ("execution.root=/elsewhere", set()),
        ("execution.engine.max_num_batched_tokens=100", set()),
        ("execution.engine.enforce_eager=true", set()),
        ("execution.engine.head_check=off", set()),
        ("execution.engine.pipeline_parallel_size=2", set()),
        ("execution.engine.extra={quantization: fp8}", set()),  # of vLLM, which runs nothing here
        ("name=other", set()),
    ],
)
def test_settings_move_the_steps_they_concern_and_no_others(
    case: Case, override: str, moved: set[str]
) -> None:
    before, after = case.prints(), case.prints(override)
    assert {name for name in before if before[name] != after[name]} == moved


def test_extra_arguments_of_vllm_that_move_numbers_are_part_of_its_models_names(
    case: Case,
) -> None:
    on_vllm = "models.teacher.engine=vllm"
    before = case.prints(on_vllm)
    after = case.prints(on_vllm, "execution.engine.extra={kv_cache_dtype: fp8, max_num_seqs: 8}")
    moved = {name for name in before if before[name] != after[name]}
    assert moved == {"signals", "trained"}
    assert case.prints(on_vllm, "execution.engine.extra={max_num_seqs: 8}") == before


def test_raising_a_stages_version_moves_it_and_what_follows(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = case.prints()
    monkeypatch.setattr(TeacherLogitsStage, "VERSION", TeacherLogitsStage.VERSION + 1)
    after = case.prints()
    assert {name for name in ALL if before[name] != after[name]} == {"signals", "trained"}
    monkeypatch.setattr(IngestStage, "VERSION", IngestStage.VERSION + 1)
    assert case.prints()["documents"] != before["documents"]


def test_the_text_is_part_of_the_name_and_its_place_is_not(case: Case, tmp_path: Path) -> None:
    before = case.prints()
    text = tmp_path / "a.jsonl"
    moved = tmp_path / "elsewhere" / "a.jsonl"
    moved.parent.mkdir()
    shutil.copyfile(text, moved)
    assert case.prints(f"steps.documents.source.paths=['{moved}']") == before
    os.utime(text, ns=(1, 1))
    assert case.prints() == before
    text.write_text(text.read_text().replace("the", "teh", 1))
    after = case.prints()
    assert {name for name in ALL if before[name] != after[name]} == ALL - {"student"}


def test_names_and_places_of_models_and_steps_do_not_matter(case: Case, tmp_path: Path) -> None:
    before = sorted(case.prints().values())
    elsewhere = shutil.copytree(case.model, tmp_path / "elsewhere" / "copy")
    assert sorted(case.prints(f"models.teacher.path={elsewhere}").values()) == before
    text = case.recipe.path.read_text()
    for old, new in (("teacher:", "T:"), ("signals", "S"), ("documents", "D"), ("trained", "X")):
        text = text.replace(old, new)
    case.recipe.path.write_text(
        text.replace("model: teacher", "model: T").replace(": teacher\n", ": T\n")
    )
    assert sorted(case.prints().values()) == before


def test_touching_a_model_or_saying_where_it_came_from_moves_nothing(case: Case) -> None:
    before = case.prints()
    for path in case.model.iterdir():
        os.utime(path, ns=(1, 1))
    edit_json(case.model / "config.json", lambda b: b.update(_name_or_path="org/model"))
    edit_json(case.model / "config.json", lambda b: b.update(transformers_version="9.9"))
    edit_json(case.model / "tokenizer.json", lambda b: b.update(truncation={"max_length": 7}))
    assert case.prints() == before


def test_another_process_with_another_hash_seed_gives_the_same_names(case: Case) -> None:
    code = (
        "import json, sys; from pathlib import Path\n"
        "from pipeline.planning.plan import make_plan\n"
        "from pipeline.planning.recipe_file import load_recipe\n"
        "plan = make_plan(load_recipe(Path(sys.argv[1])))\n"
        "print(json.dumps({step.name: step.fingerprint for step in plan}))"
    )
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", code, str(case.recipe.path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(found.stdout) == case.prints()


def test_the_name_is_pinned() -> None:
    """Another value here orphans every cache in the world: raise a stage's version instead."""
    identity = {"stage": "x", "version": 1, "config": {"b": [1, 2.5, None, True], "a": "\u00e9"}}
    assert canonical_json(identity) == (
        '{"config":{"a":"\\u00e9","b":[1,2.5,null,true]},"stage":"x","version":1}'
    )
    assert fingerprint_of(identity).startswith("e202277f7b8c")


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": {"b": {1, 2}}}, r"identity\.a\.b is a set"),
        ({"a": [1, Path("/x")]}, r"identity\.a\[1\] is a PosixPath"),
        ({"a": object()}, r"identity\.a is a object"),
        ({"a": float("nan")}, r"identity\.a is nan: only finite numbers"),
        ({"a": float("-inf")}, r"identity\.a is -inf"),
        ({"a": {1: 2}}, r"identity\.a has the key 1; keys must be text"),
        ({"a": len}, r"identity\.a is a builtin_function_or_method"),
        ({"a": np.int64(3)}, r"identity\.a is a int64"),
        ({"a": b"bytes"}, r"identity\.a is a bytes"),
    ],
)
def test_a_value_without_stable_bytes_raises(value: Any, place: str) -> None:
    with pytest.raises(TypeError, match=place):
        fingerprint_of(value)


def test_a_remembered_hash_ends_with_any_change_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    assert remembered_sha256(path) == sha256_of(path)
    memory = list((tmp_path / "cache" / "sha256").iterdir())
    assert len(memory) == 1 and remembered_sha256(path) == sha256_of(path)
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp, stamp))  # as `cp -p` and `rsync -t` leave it
    assert remembered_sha256(path) == sha256_of(path)
    path.write_bytes(b"three")
    assert remembered_sha256(path) == sha256_of(path)


def test_a_hash_is_remembered_by_the_file_a_link_leads_to(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode())
    link = tmp_path / "link"
    for name in ("one", "two"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        assert remembered_sha256(link) == sha256_of(tmp_path / name)


def test_a_cache_that_is_torn_or_cannot_be_written_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    remembered_sha256(path)
    (memory,) = (tmp_path / "cache" / "sha256").iterdir()
    memory.write_text("")
    assert remembered_sha256(path) == sha256_of(path)
    monkeypatch.setenv("TEACHERCACHE_CACHE", str(path))  # a file: nothing can be made below it
    assert remembered_sha256(path) == sha256_of(path)


def test_folders_that_are_no_models_are_refused(case: Case) -> None:
    config = case.model / "config.json"
    good = config.read_text()
    for text, expected in (
        ("{", f"cannot read {config}: "),
        ("[]", f"{config} holds no JSON object"),
        ("{}", "config.json gives no vocab_size: expected a language model"),
    ):
        config.write_text(text)
        assert expected in str(error_of(case.recipe))
    config.write_text(good)
    (case.model / "model.safetensors").unlink()
    assert "has no weight file (*.safetensors or *.bin)" in str(error_of(case.recipe))
    config.unlink()
    with pytest.raises(ConfigError, match=r"it has no config\.json; give the path of a folder"):
        model_identity(case.model, dtype="float32", engine="vllm")


def test_a_config_with_an_infinite_number_names_its_model(case: Case) -> None:
    """State-space models' have one: ``"time_step_limit": [0.0, Infinity]``."""
    path = case.model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"time_step_limit": [0.0, math.inf]}))
    first = fingerprint_of(model_identity(case.model, dtype="float32", engine="vllm"))
    path.write_text(json.dumps(config | {"time_step_limit": [0.0, 1.0]}))
    assert first != fingerprint_of(model_identity(case.model, dtype="float32", engine="vllm"))


def test_sizes_come_from_the_text_part_of_a_nested_config(tmp_path: Path) -> None:
    config = {"text_config": {"vocab_size": 262_144, "hidden_size": 640}, "model_type": "x"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (vocab_size_of(tmp_path), hidden_size_of(tmp_path)) == (262_144, 640)
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 768, "vocab_size": 50_257}))
    assert (vocab_size_of(tmp_path), hidden_size_of(tmp_path)) == (50_257, 768)


def test_an_instruct_teacher_and_a_base_student_share_their_vocabulary(
    case: Case, tmp_path: Path
) -> None:
    """Chat template and end of text differ, ids do not."""
    other = shutil.copytree(case.model, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    edit_json(other / "tokenizer_config.json", lambda b: b.update(eos_token="a"))
    edit_recipe(case.recipe, "models", "other", value={"path": str(other)})
    steps = {step.name: step for step in case.recipe.plan("steps.signals.model=other")}
    assert steps["signals"].identity != case.recipe.step("signals").identity
    student = {step.name: step for step in case.recipe.plan("steps.student.model=other")}
    assert student["trained"].inputs[0].fingerprint == steps["documents"].fingerprint


def test_a_teacher_with_another_tokenizer_is_refused_before_anything_runs(
    case: Case, tmp_path: Path
) -> None:
    other = shutil.copytree(case.model, tmp_path / "other")
    edit_json(other / "tokenizer.json", swap_two_merges)
    edit_recipe(case.recipe, "models", "other", value={"path": str(other)})
    line = str(error_of(case.recipe, "steps.signals.model=other"))
    assert line.startswith("steps.signals: step 'documents' holds ids of vocabulary ")
    assert "model 'other' has" in line and "make the documents with" in line
    line = str(error_of(case.recipe, "steps.student.model=other"))
    assert line.startswith("steps.trained: step 'documents' holds ids of vocabulary ")
