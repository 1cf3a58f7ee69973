"""Recipes: every wrong value is one readable line that names the place as the file spells it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.planning.recipe_file import load_recipe
from schemas.errors import ConfigError
from tests.fixtures.tiny_recipe import TinyRecipe, edit_recipe, error_of, make_recipe

SHORT = """
name: short
models:
  teacher:
    path: /models/t
    engine: transformers
steps:
  signals: {stage: teacher_logits, input: documents, model: teacher}
"""


@pytest.fixture
def recipe(tiny_model: Path, paragraphs: list[str], tmp_path: Path) -> TinyRecipe:
    return make_recipe(tmp_path, tiny_model, paragraphs[:3])


def line_of(path: Path, *overrides: str) -> str:
    """Return the message of the refusal, which has to be one line and name the file or setting."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500, line
    return line


def short(tmp_path: Path, text: str = SHORT) -> Path:
    (tmp_path / "short.yaml").write_text(text)
    return tmp_path / "short.yaml"


@pytest.mark.parametrize(
    ("keys", "value", "expected"),
    [
        (
            ("steps", "signals", "encodng"),
            {},
            "steps.signals.encodng: no such setting; did you mean 'encoding'?",
        ),
        (
            ("steps", "signals", "encoding", "kk"),
            3,
            "steps.signals.encoding.kk: no such setting; did you mean 'k'?",
        ),
        (
            ("steps", "signals", "encoding"),
            {"kind": "top_k", "k": 8, "tau": 0.1},  # another kind has it
            "steps.signals.encoding.tau: no such setting; there are: k, kind",
        ),
        (
            ("models", "teacher", "dtyp"),
            "x",
            "models.teacher.dtyp: no such setting; did you mean 'dtype'?",
        ),
        (
            ("execution", "worker"),
            2,
            "execution.worker: no such setting; did you mean 'workers'?",
        ),
        (
            ("execution", "engine", "tp"),
            2,
            "execution.engine.tp: no such setting; there are: cache_dir, device, ",
        ),
        (
            ("seed",),
            1,
            "seed: no such setting; there are: execution, models, name, schedule, steps",
        ),
        (
            ("steps", "signals", "encoding", "k"),
            "many",
            'steps.signals.encoding.k: got "many", expected a whole number',
        ),
        (("steps", "signals", "encoding", "k"), 1, "encoding.k: got 1, expected at least 2"),
        (("steps", "signals", "seed"), [1], "steps.signals.seed: got [1], expected a whole number"),
        (
            ("steps", "documents", "length"),
            None,
            "steps.documents.length: got null, expected a whole number",
        ),
        (("steps", "documents", "source", "paths"), [], "steps.documents.source.paths: "),
        (
            ("steps", "documents", "source", "kind"),
            "csv",
            "steps.documents.source.kind: got 'csv', expected one of",
        ),
        (
            ("steps", "signals", "stage"),
            "teacher",
            "steps.signals.stage: got 'teacher', expected one of",
        ),
        (
            ("steps", "signals", "encoding", "kind"),
            "topk",
            "steps.signals.encoding.kind: got 'topk', expected one",
        ),
        (
            ("models", "teacher", "dtype"),
            "int8",
            "models.teacher.dtype: got \"int8\", expected 'float32',",
        ),
        (
            ("models", "teacher", "engine"),
            "tgi",
            "models.teacher.engine: got \"tgi\", expected 'vllm' or",
        ),
        (("models", "teacher", "step"), "student", "models.teacher: give either 'path'"),
        (("models", "teacher", "path"), None, "models.teacher: give either 'path'"),
        (("execution", "workers"), 0, "execution.workers: got 0, expected at least 1"),
        (
            ("execution", "executor"),
            "slurm",
            "execution.executor: got \"slurm\", expected 'local' or",
        ),
        (
            ("execution", "engine", "extra"),
            {"max_model_len": 64},
            "execution.engine.extra: 'max_model_len' is set by the engine itself or by a setting",
        ),
        (("steps",), {}, "steps: got {}, expected at least 1 of them"),
        (("name",), "a/b", 'name: got "a/b", expected text of the form'),
        (("models",), [], "models: got [], expected a mapping of settings"),
        (("models", "teacher", "path"), "", "models.teacher: got an empty text for a path"),
        (("execution", "root"), None, "execution.root: got null, expected a path"),
        (("execution", "root"), "", "execution.root: got an empty text"),
        (("steps", "documents"), None, "steps.documents: got null, expected a mapping"),
        (("steps", "documents", "stage"), None, "steps.documents.stage: got 'None', expected one"),
        (("steps", "documents", "source", "paths"), "a", '.paths: got "a", expected a list'),
        (("steps", "documents", "heldout_fraction"), float("nan"), "got nan, expected a finite"),
        (("execution", "engine", "extra"), {"x": {"y": float("inf")}}, "y: got inf, expected a"),
        (("execution", "engine", "extra"), {1: 2}, "extra: the key 1 is no text: put it in quot"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(
    recipe: TinyRecipe, keys: tuple[str, ...], value: Any, expected: str
) -> None:
    edit_recipe(recipe, *keys, value=value)
    line = line_of(recipe.path)
    assert line.startswith(f"{recipe.path}: ") and expected in line, line


def test_all_that_is_wrong_is_told_at_once(recipe: TinyRecipe) -> None:
    edit_recipe(recipe, "steps", "signals", "encoding", "kk", value=1)
    edit_recipe(recipe, "execution", "worker", value=1)
    line = line_of(recipe.path)
    assert "steps.signals.encoding.kk: " in line and "; execution.worker: " in line


def test_required_settings_are_named(recipe: TinyRecipe) -> None:
    body = yaml.safe_load(recipe.path.read_text())
    del body["steps"]["documents"]["length"], body["steps"]["signals"]["model"]
    recipe.path.write_text(yaml.safe_dump(body))
    line = line_of(recipe.path)
    assert "steps.documents.length: this setting is missing" in line
    assert "steps.signals.model: this setting is missing" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\nsteps: [1, 2\n", "is not YAML: line 3, column 1: "),
        ("name: x\nsteps:\n\tdocuments: 1\n", "is not YAML: line 3, column 1: found character"),
        ("name: x\n name: y\n", "is not YAML: line 2, column 6: mapping values are not allowed"),
        ("name: x\nsteps: {}\nname: y\n", "is not YAML: line 3, column 1: the key 'name' is given"),
        ("", "holds a NoneType, expected a mapping"),
        ("- a\n- b\n", "holds a list, expected a mapping with 'steps'"),
        ("just words", "holds a str, expected a mapping"),
    ],
)
def test_what_is_not_a_recipe_at_all(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in line_of(short(tmp_path, text))


def test_a_step_given_twice_is_refused_rather_than_lost(tmp_path: Path) -> None:
    text = SHORT + "  signals: {stage: teacher_logits, input: documents, model: teacher}\n"
    assert "line 9, column 3: the key 'signals' is given twice" in line_of(short(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot read the recipe" in line_of(tmp_path / "nowhere.yaml")
    assert "cannot read the recipe" in line_of(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    assert "is not UTF-8 text: byte 6" in line_of(tmp_path / "binary.yaml")


def test_variables_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SHORT.replace("/models/t", "${WHERE_MODELS_LIE}/a/${WHICH:-small}-x")
    path = short(tmp_path, text)
    monkeypatch.setenv("WHERE_MODELS_LIE", "/data")
    monkeypatch.delenv("WHICH", raising=False)
    assert load_recipe(path).models["teacher"].path == "/data/a/small-x"
    monkeypatch.setenv("WHICH", "large")
    assert load_recipe(path).models["teacher"].path == "/data/a/large-x"
    monkeypatch.setenv("WHICH", "")
    assert load_recipe(path).models["teacher"].path == "/data/a/-x"
    monkeypatch.delenv("WHERE_MODELS_LIE")
    line = line_of(path)
    assert "models: teacher: path: the environment variable WHERE_MODELS_LIE is not set" in line
    overridden = load_recipe(path, ["models.teacher.path=${ELSE:-/other}/t"])
    assert overridden.models["teacher"].path == "/other/t"


def test_variables_inside_lists(
    recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEXT_FOLDER", str(tmp_path))
    edit_recipe(recipe, "steps", "documents", "source", "paths", value=["${TEXT_FOLDER}/a.jsonl"])
    assert recipe.load().steps["documents"].source.paths == (f"{tmp_path}/a.jsonl",)  # type: ignore[union-attr]


def test_overrides_change_values_of_every_kind(recipe: TinyRecipe) -> None:
    loaded = recipe.load(
        "steps.signals.encoding.k=32",
        "steps.documents.source.paths.0=/b.jsonl",
        "execution.workers=3",
        "execution.engine.enforce_eager=true",
        "models.student={path: /s, dtype: float16}",
        "steps.documents.heldout_fraction=0",
    )
    signals, documents = loaded.steps["signals"], loaded.steps["documents"]
    assert signals.encoding.k == 32  # type: ignore[union-attr]
    assert documents.source.paths == ("/b.jsonl",)  # type: ignore[union-attr]
    assert documents.heldout_fraction == 0.0  # type: ignore[union-attr]
    assert (loaded.execution.workers, loaded.execution.engine.enforce_eager) == (3, True)
    assert loaded.models["student"].dtype == "float16"
    wider = recipe.load("steps.documents.source.paths=[/b.jsonl, /c.jsonl]")
    assert wider.steps["documents"].source.paths == ("/b.jsonl", "/c.jsonl")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("workers", "--set takes path=value (such as execution.workers=2), got 'workers'"),
        ("=3", "--set takes path=value"),
        ("execution.workers=[1", "--set execution.workers: '[1' is not a YAML value: line 1"),
        ("execution.workers=x: y: z", "--set execution.workers: 'x: y: z' is not a YAML value"),
        ("steps.documents.length.x=3", "--set steps.documents.length.x: 'steps.documents.length'"),
        ("steps.documents.length.x.y=3", "'x' lies inside a value, not a mapping"),
        ("steps.documents.source.paths.7=a", "'7' is not an index below 1"),
        ("steps.documents.source.paths.last=a", "'last' is not an index below 1"),
        ("execution.workerz=2", "execution.workerz: no such setting"),
        ("execution.workers=two", 'execution.workers: got "two", expected a whole number'),
    ],
)
def test_wrong_overrides_are_refused(recipe: TinyRecipe, override: str, expected: str) -> None:
    assert expected in line_of(recipe.path, override)


STUDENT = {"stage": "student_init", "model": "teacher", "layers": 2}
TRAINED = {"stage": "train", "student": "teacher", "objective": {"loss": "kd"}, "max_steps": 2}


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (
            {"steps.signals.input": "docs"},
            "steps.signals.input: 'docs' is not an earlier step that writes a table; "
            "there are: documents",
        ),
        (
            {"steps.signals.input": "signals"},
            "steps.signals.input: 'signals' is not an earlier step",
        ),
        (
            {"steps.signals.model": "techer"},
            "steps.signals.model: 'techer' is neither under 'models' nor an earlier checkpoint; "
            "there are: teacher",
        ),
        (
            {"steps.student": {**STUDENT, "model": "documents"}},
            "steps.student.model: 'documents' is not an earlier step that makes a checkpoint",
        ),
        (
            {"models.other": {"step": "student"}, "steps.signals.model": "other"},
            "models.other.step: 'student' is not an earlier step that makes a checkpoint",
        ),
        (
            {"models.other": {"step": "student"}, "steps.documents.tokenizer": "other"},
            "steps.documents.tokenizer: model 'other' is made by a step, expected a model folder",
        ),
        (
            {"steps.documents.tokenizer": "/no/such"},
            "steps.documents.tokenizer: '/no/such' is neither under 'models' nor a folder; ",
        ),
        ({"steps.signals.model": "x", "models.x": {"path": "/no/such"}}, "/no/such is not a model"),
        ({"steps.documents.source.paths": ["/no/*.jsonl"]}, "no file matches '/no/*.jsonl'"),
        ({"steps.documents.source.paths": ["/"]}, "'/' is a folder, expected files: name them"),
        ({"models.teacher.path": __file__}, f"{__file__} is a file: give the path of a model"),
        (
            {"steps.student": {**STUDENT, "layers": 3}},
            "steps.student.layers: got 3, expected 2 to 2 (the teacher's number of layers)",
        ),
        (
            {"steps.student": {**STUDENT, "layers": [1, 2]}},
            "steps.student.layers: got [1, 2], expected indices from 0 to 1",
        ),
        (
            {"steps.trained": {**TRAINED, "data": ["signals"]}},
            "steps.trained.data: objective 'kd' needs a documents, episodes or conversations "
            "table, the data has: teacher_logits",
        ),
        (
            {"steps.trained": {**TRAINED, "data": ["documents"]}},
            "steps.trained.data: objective 'kd' needs a teacher_logits table, the data has: docume",
        ),
        (
            {
                "steps.trained": {
                    **TRAINED,
                    "data": ["documents", "signals"],
                    "objective": {"loss": "kd", "divergence": {"kind": "reverse_kl"}},
                }
            },
            "steps.trained.data: objective 'kd' asks for reverse_kl, which needs whole "
            "distributions, and the teacher_logits are of encoding threshold",
        ),
        (
            {"steps.trained": {**TRAINED, "data": ["documents", "signals", "documents"]}},
            "steps.trained.data: there are 2 tables of rows, and no teacher_logits stand behind "
            "number 3, documents",
        ),
        (
            {"steps.trained": {**TRAINED, "data": ["signals", "documents", "documents"]}},
            "steps.trained.data: it begins with teacher_logits and has 2 tables of rows",
        ),
        (
            {"steps.trained": {**TRAINED, "data": ["documents", "signals", "signals"]}},
            "steps.trained.data: 2 of its tables are teacher_logits about the same rows, expected "
            "one of each kind: name one of them, or give 'objective.mixture:",
        ),
        (
            {
                "steps.trained": {
                    **TRAINED,
                    "data": ["documents", "signals", "documents"],
                    "objective": {"loss": "cross_entropy"},
                }
            },
            "steps.trained.data: 2 of its tables are documents, expected one of each kind",
        ),
        (
            {"steps.trained": {**TRAINED, "data": ["signals"], "objective": {"loss": "sft"}}},
            "steps.trained.data: objective 'sft' needs a preference_pairs or conversations table",
        ),
    ],
)
def test_a_dangling_reference_is_named_before_anything_runs(
    recipe: TinyRecipe, edits: dict[str, Any], expected: str
) -> None:
    for path, value in edits.items():
        edit_recipe(recipe, *path.split("."), value=value)
    assert str(error_of(recipe)).startswith(expected)


def test_the_root_does_not_depend_on_where_a_later_command_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = short(tmp_path, SHORT + "execution: {root: here}\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path).execution.root == tmp_path / "here"
