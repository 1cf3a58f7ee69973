"""Model folders that bring code of their own: it runs where a recipe says so, and nowhere else."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.planning.fingerprint import vocab_size_of
from schemas.dataset import open_dataset
from schemas.errors import ConfigError, EngineError
from stages.models.causal_lm.language_head import LanguageHead, read_config
from stages.models.causal_lm.model import load_student
from stages.models.checkpoints import own_code
from stages.models.checkpoints.own_code import is_trusted, trust
from stages.models.engines.engine import open_engine
from stages.models.spec import EngineOptions
from stages.stage import StageContext, TableStage
from stages.student.distiller.distiller import distiller_of
from tests.conftest import PARAGRAPHS
from tests.fixtures.tiny_recipe import (
    TinyRecipe,
    edit_recipe,
    error_of,
    make_recipe,
    teachercache,
)

SCALE = 0.375
CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
    own_scale = 1.0
"""
MODELING = """
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .configuration_own import OwnConfig


class OwnNorm(LlamaRMSNorm):
    scale = 1.0

    def forward(self, hidden_states):
        return super().forward(hidden_states) * self.scale


class OwnModel(LlamaModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.norm = OwnNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm.scale = config.own_scale
        self.post_init()


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()
"""
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
TRUST = "models.teacher.trust_remote_code=true"


@pytest.fixture(autouse=True)
def _nothing_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_code, "_trusted", set())


@pytest.fixture(scope="module", autouse=True)
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let transformers keep its copies of the code in a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setenv("HF_MODULES_CACHE", place)
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
        yield


@pytest.fixture
def own_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny Llama as a model type of its own, whose code scales what its last norm gives."""
    folder = tmp_path / "own"
    shutil.copytree(tiny_model, folder)
    edit_config(folder, model_type="own_llama", own_scale=SCALE, auto_map=AUTO_MAP)
    edit_config(folder, architectures=["OwnForCausalLM"])
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    return folder


@pytest.fixture
def recipe(own_model: Path, tmp_path: Path) -> TinyRecipe:
    made = make_recipe(tmp_path / "recipe", own_model, PARAGRAPHS[300:306])
    edit_recipe(made, "steps", "signals", "encoding", value={"kind": "exact"})
    return made


def edit_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def plain_logits(folder: Path, ids_T: np.ndarray[Any, Any], scale: float) -> torch.Tensor:
    """[T, V] by transformers' own Llama in float64, scaled afterwards."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.inference_mode():
        logits_TV = model(torch.from_numpy(ids_T.astype(np.int64))[None]).logits[0]
    assert isinstance(logits_TV, torch.Tensor)
    return logits_TV * scale


def check_numbers(recipe: TinyRecipe, tiny_model: Path, *, scale: float, says: str) -> None:
    folders = [recipe.step(name, says).folder for name in ("documents", "signals")]
    rows = open_dataset(folders, split="train")
    head = LanguageHead.load(folders[1], device="cpu")
    for row in (rows[index] for index in range(min(2, len(rows)))):
        logits_PV = plain_logits(tiny_model, row["input_ids_T"], scale)[:-1]
        expected_PV = logits_PV.log_softmax(-1).numpy()
        found_PV = head.logits(torch.from_numpy(row["hidden_PD"].copy())).log_softmax(-1).numpy()
        np.testing.assert_allclose(found_PV, expected_PV, atol=0.02)  # float16 hidden states
        next_P = row["input_ids_T"][1:].astype(int)
        expected_P = expected_PV[np.arange(len(next_P)), next_P]
        np.testing.assert_allclose(row["next_token_logprobs_P"], expected_P, rtol=2e-3, atol=2e-3)


def test_a_teachers_own_code_runs_where_the_recipe_says_so(
    recipe: TinyRecipe, tiny_model: Path, own_model: Path
) -> None:
    value = {"stage": "evaluate", "students": ["teacher"], "data": ["documents", "signals"]}
    edit_recipe(recipe, "steps", "report", value=value)
    assert recipe.run(TRUST).finished == ["documents", "signals", "report"]
    check_numbers(recipe, tiny_model, scale=SCALE, says=TRUST)
    report = json.loads((recipe.step("report", TRUST).folder / "evaluation.json").read_text())
    assert report["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-3)
    assert "runs its own code" in teachercache("show", recipe.path, "--set", TRUST).out
    before = recipe.step("signals", TRUST).identity["models"][0]
    assert set(before["code"]) == {"configuration_own.py", "modeling_own.py"}
    with (own_model / "configuration_own.py").open("a") as file:
        file.write("# other bytes\n")
    assert recipe.step("signals", TRUST).identity["models"][0]["code"] != before["code"]


@pytest.mark.slow
def test_workers_run_it_too(recipe: TinyRecipe, tiny_model: Path) -> None:
    recipe.run(TRUST, "execution.workers=2")
    check_numbers(recipe, tiny_model, scale=SCALE, says=TRUST)


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_runs_it_too(own_model: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = own_model.rename(tmp_path / "in_vllm")  # vLLM makes the class of this name its own
    trust(folder, True)
    options = EngineOptions(device="cpu", cache_dir=tmp_path, kv_cache_memory_bytes=1 << 26)
    ids_T = np.arange(5, 45)
    with open_engine("vllm", folder, dtype="float32", options=options) as engine:
        (hidden_TD,) = engine.hidden_states([ids_T])
        found_TV = engine.head.logits(hidden_TD).double()
    expected_TV = plain_logits(tiny_model, ids_T, SCALE)
    torch.testing.assert_close(found_TV, expected_TV, rtol=0, atol=1e-4)


def test_a_process_that_planned_nothing_has_it_from_the_stage(
    recipe: TinyRecipe, own_model: Path, tmp_path: Path
) -> None:
    """As a worker of another process or an actor of Ray gets it."""
    step = recipe.step("signals", TRUST)
    models = {name: model.spec() for name, model in step.models.items()}
    options = recipe.load().execution.engine
    context = StageContext(tmp_path / "out", vocab_size_of(own_model), models, options)
    stage, context = pickle.loads(pickle.dumps((step.stage, context)))
    trust(own_model, False)
    assert isinstance(stage, TableStage)
    with stage.open(context):
        assert is_trusted(own_model)


def test_nothing_runs_where_nobody_says_so(
    recipe: TinyRecipe, own_model: Path, tmp_path: Path
) -> None:
    error = error_of(recipe)
    assert isinstance(error, ConfigError) and error.exit_code == 2
    assert str(error) == (
        f"models.teacher: {own_model} brings code of its own (configuration_own.py, "
        f"modeling_own.py, by auto_map in its config.json), which runs only where the recipe says "
        f"so: read it, then set models.teacher.trust_remote_code: true (or false, for the "
        f"libraries' own class of its model_type)"
    )
    said = teachercache("run", recipe.path)
    assert (said.code, said.error) == (2, str(error))
    needed = "it needs code of its own .auto_map., which runs only where a recipe says so"
    options = EngineOptions(device="cpu", cache_dir=tmp_path)
    for opens in (
        lambda: read_config(own_model),
        lambda: load_student(own_model, device=torch.device("cpu")),
        lambda: open_engine(
            "transformers", own_model, dtype="float32", options=options
        ).__enter__(),
    ):
        with pytest.raises(ConfigError, match=needed):
            opens()
    said = teachercache("student", "init", "--from", own_model, "--layers", "1", tmp_path / "s")
    assert said.code == 2 and "it needs code of its own" in said.error


def test_false_is_the_class_of_the_libraries(recipe: TinyRecipe, own_model: Path) -> None:
    """With the name and numbers of a folder without code."""
    edit_config(own_model, model_type="llama", auto_map=None)
    without = recipe.step("signals").identity["models"][0]
    edit_config(own_model, auto_map=AUTO_MAP)
    says = "models.teacher.trust_remote_code=false"
    recipe.run(says)
    check_numbers(recipe, own_model, scale=1.0, says=says)
    named = recipe.step("signals", says).identity["models"][0]
    assert {**named, "config": {**named["config"], "auto_map": None}} == without


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"auto_map": None}, "trust_remote_code: {own} brings no code of its own"),
        (
            {"auto_map": {"AutoConfig": "someone/else--configuration_own.OwnConfig"}},
            "trust_remote_code: {own} takes its code from someone/else--configuration_own.py",
        ),
    ],
)
def test_code_that_is_not_in_the_folder(
    recipe: TinyRecipe, own_model: Path, settings: dict[str, Any], line: str
) -> None:
    edit_config(own_model, **settings)
    said = str(error_of(recipe, TRUST))
    assert said.startswith("models.teacher." + line.format(own=own_model))


def test_models_of_one_folder_say_the_same(recipe: TinyRecipe, own_model: Path) -> None:
    edit_recipe(recipe, "models", "other", value={"path": str(own_model)})
    said = str(error_of(recipe, TRUST, "models.other.trust_remote_code=false"))
    assert said.startswith("models.other.trust_remote_code: model 'teacher' is the same folder")


@pytest.mark.parametrize(
    "step",
    [
        {"stage": "student_init", "model": "teacher", "layers": 1},
        {
            "stage": "train",
            "student": "teacher",
            "data": ["documents"],
            "objective": {"loss": "cross_entropy"},
            "max_steps": 1,
        },
    ],
)
def test_no_model_is_made_of_one_with_its_own_code(recipe: TinyRecipe, step: Any) -> None:
    edit_recipe(recipe, "steps", "made", value=step)
    assert "model 'teacher' brings code of its own, which the model that this step makes" in str(
        error_of(recipe, TRUST)
    )


def test_an_adapter_on_own_code_is_refused(recipe: TinyRecipe) -> None:
    error = error_of(recipe, TRUST, "models.teacher.adapter=somewhere")
    assert "merge an adapter into it beforehand" in str(error)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "def forward(self, *args, **kwargs):\n        raise AttributeError('seen_tokens')",
            "seen",
        ),
        ("import no_such_package", "no_such_package"),
    ],
)
def test_code_that_fails_is_one_line(
    own_model: Path, tmp_path: Path, body: str, reason: str
) -> None:
    folder = own_model.rename(tmp_path / f"fails_{reason}")
    with (folder / "modeling_own.py").open("a") as file:
        file.write(f"\n    {body}\n")
    trust(folder, True)
    options = EngineOptions(device="cpu", cache_dir=tmp_path)
    opened = open_engine("transformers", folder, dtype="float32", options=options)
    with pytest.raises(EngineError, match=f"(?s)start-up check: .*{reason}") as caught:
        opened.__enter__()
    assert "\n" not in str(caught.value)


def test_code_of_another_folder_of_that_name_is_not_taken_for_its_own(
    own_model: Path, tmp_path: Path
) -> None:
    """transformers would, in one process, where their configurations are equal."""
    other = shutil.copytree(own_model, tmp_path / "other" / "own")
    with (other / "modeling_own.py").open("a") as file:
        file.write("\n\nOTHER = 1\n")
    trust(own_model, True)
    trust(other, True)
    load_student(own_model, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="other code of a folder that is called 'own' too"):
        load_student(other, device=torch.device("cpu"))


@pytest.mark.parametrize("is_allowed", [False, True])
def test_a_distiller_is_of_a_class_of_transformers(own_model: Path, is_allowed: bool) -> None:
    """Its folder holds no code, so it could not be opened again."""
    trust(own_model, is_allowed)
    expected = "needs code of its own" if not is_allowed else "class transformers itself has"
    with pytest.raises(ConfigError, match=expected):
        distiller_of(own_model, num_vectors=4, reader_hidden_size=32, reader="", seed=0)
