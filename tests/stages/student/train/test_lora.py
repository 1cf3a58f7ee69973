"""LoRA on a student: an adapter as PEFT knows it is trained, saved, gone on from and measured."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigError
from schemas.storage.files import sha256_of
from stages.models.checkpoints.adapters import served_rank, whole_model
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.student.evaluate.positions import evaluate
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import TrainResult, train
from tests.fixtures.cached_data import CachedData
from tests.fixtures.episode_data import EpisodeData, make_episode_data
from tests.fixtures.preference_data import PreferenceData, make_preference_data
from tests.fixtures.tiny_recipe import (
    Said,
    TinyRecipe,
    edit_recipe,
    error_of,
    finish,
    make_recipe,
    teachercache,
)
from tests.servers.warm_python import WarmProcess

OPTIONS = TrainOptions(num_workers=0, log_every=1, checkpoint_every=3)
LORA = {"rank": 4, "targets": ["q_proj", "down_proj"], "dropout": 0.1}
CONFIG = TrainConfig.model_validate(
    {"max_steps": 20, "lr": 2e-2, "per_device_batch_size": 4, "lora": LORA}
    | {"objective": {"loss": "kd", "weight": 1.0}}
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> EpisodeData:
    return make_episode_data(tmp_path_factory.mktemp("cache"), encodings=("threshold",))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PreferenceData:
    return make_preference_data(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def data(episodes: EpisodeData) -> CachedData:
    return episodes.text


def run(data: CachedData, output: Path, config: TrainConfig = CONFIG, **more: Any) -> TrainResult:
    tables = data.tables("threshold")
    return train(config, student=data.student, data=tables, output=output, options=OPTIONS, **more)


def changed(config: TrainConfig, **values: Any) -> TrainConfig:
    return TrainConfig.model_validate(config.model_dump() | values)


def test_an_adapter_is_trained_and_plain_peft_reads_it(data: CachedData, tmp_path: Path) -> None:
    weights = sha256_of(data.student / "model.safetensors")
    result = run(data, tmp_path / "out")
    after = result.metrics["after"]
    found = [entry["loss"] for entry in result.history]
    assert sum(found[-5:]) < sum(found[:5]) - 0.5 and after != result.metrics["before"]
    assert sha256_of(data.student / "model.safetensors") == weights
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= written
    assert not {"model.safetensors", "config.json", "checkpoints"} & written
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8.0, "LORA")
    record = read_checkpoint(tmp_path / "out")
    assert record is not None and record.identity["student"]["model.safetensors"] == weights

    base: Any = AutoModelForCausalLM.from_pretrained(data.student)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    merged = AutoModelForCausalLM.from_pretrained(whole_model(tmp_path / "out")).eval()
    untrained = AutoModelForCausalLM.from_pretrained(data.student).eval()
    ids_BT = torch.arange(20)[None]
    with torch.no_grad():
        logits_TV, ours_TV, old_TV = (m(ids_BT).logits[0] for m in (plain, merged, untrained))
    torch.testing.assert_close(ours_TV, logits_TV, rtol=1e-4, atol=1e-4)
    assert (logits_TV - old_TV).abs().max() > 0.1
    measured = evaluate(whole_model(tmp_path / "out"), data.tables("threshold"))
    assert measured == pytest.approx(after, rel=1e-5)


def test_by_default_every_linear_layer_but_the_head_has_an_update(
    data: CachedData, tmp_path: Path
) -> None:
    config = changed(CONFIG, lora={"rank": 2}, max_steps=1, gradient_checkpointing=True)
    run(data, tmp_path / "out", config, heldout=False)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    layers = {key.split(".lora_")[0].rpartition(".")[2] for key in saved}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert layers == attention | {"gate_proj", "up_proj", "down_proj"}
    assert served_rank(tmp_path / "out") == 8  # what vLLM makes room for
    assert all(bool(tensor.any()) for tensor in saved.values()), "every update has learned"


def test_an_adapter_is_trained_further(data: CachedData, tmp_path: Path) -> None:
    first = run(data, tmp_path / "first")
    second = run(data, tmp_path / "second", adapter=tmp_path / "first")
    assert second.metrics["before"] == pytest.approx(first.metrics["after"], rel=1e-5)
    losses = [[entry["loss"] for entry in run.history] for run in (first, second)]
    assert sum(losses[1][-5:]) < sum(losses[0][-5:])
    assert second.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "loss", ["cross_entropy", "sft", "dpo", "dckd", "adpa", "bialign", "icl_distillation"]
)
def test_every_objective_of_a_student_trains_an_adapter(
    loss: str, episodes: EpisodeData, pairs: PreferenceData, tmp_path: Path
) -> None:
    tables = {
        "cross_entropy": [episodes.text.documents],
        "sft": [pairs.pairs],
        "dpo": pairs.dpo,
        "dckd": pairs.dckd("threshold"),
        "adpa": pairs.adpa("threshold"),
        "bialign": episodes.bialign("threshold"),
        "icl_distillation": episodes.icl,
    }[loss]
    objective = {"loss": loss} | ({"lm_weight": 0.0} if loss == "icl_distillation" else {})
    student = pairs.student if loss in ("sft", "dpo", "dckd", "adpa") else episodes.student
    config = changed(CONFIG, objective=objective, lora={"rank": 4}, max_steps=8)
    result = train(config, student=student, data=tables, output=tmp_path / "out", options=OPTIONS)
    found = [entry["loss"] for entry in result.history]
    assert sum(found[-3:]) < sum(found[:3])


KILL_ITSELF = """
import json, os, sys
from pathlib import Path
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train

def on_event(event):
    if event["event"] == "start":
        print(event["step"])
    if event["event"] == "step" and event["step"] == int(sys.argv[3]):
        os.kill(os.getpid(), 9)

root = Path(sys.argv[1])
config = TrainConfig.model_validate_json(sys.argv[4])
options = TrainOptions(num_workers=0, log_every=1, checkpoint_every=2)
for output in sys.argv[2].split(","):
    result = train(config, student=root / "student", data=[root / "documents", root / "threshold"],
                   output=Path(output), options=options, on_event=on_event)
    print(json.dumps([entry["loss"] for entry in result.history]))
"""


def test_a_killed_run_goes_on_with_the_same_adapter(data: CachedData, tmp_path: Path) -> None:
    """With dropout, whose draws go on too; the second process makes a whole run to compare with."""
    config = changed(CONFIG, max_steps=7).model_dump_json()

    def trained(kill_at: int, *outputs: str) -> Said:
        folders = ",".join(str(tmp_path / output) for output in outputs)
        words = ["-c", str(data.root), folders, str(kill_at), config]
        return finish(WarmProcess(KILL_ITSELF, words, dict(os.environ)))

    assert trained(5, "killed").code == -9
    kept = tmp_path / "killed" / "checkpoints" / "checkpoint-4"
    assert (kept / "adapter_model.safetensors").is_file()
    assert not (kept / "model.safetensors").exists()
    said = trained(-1, "killed", "whole")
    assert said.code == 0, said.err
    begun, resumed, at_first, whole = map(json.loads, said.out.splitlines())
    assert (begun, at_first) == (4, 0) and resumed == whole
    records = [read_checkpoint(tmp_path / name) for name in ("killed", "whole")]
    assert records[0] is not None and records[1] is not None
    killed, at_once = (dict(record.files) for record in records if record is not None)
    assert killed.pop("metrics.json") and at_once.pop("metrics.json")  # they hold the time taken
    assert killed == at_once


@pytest.fixture
def recipe(tiny_model: Path, paragraphs: list[str], tmp_path: Path) -> TinyRecipe:
    """An adapter on a new student, one that goes on from it, and one trained from both merged."""
    common = {"stage": "train", "data": ["documents", "signals"], "max_steps": 2}
    steps = {
        "student": {"stage": "student_init", "model": "teacher", "layers": [0]},
        "adapted": {**common, "student": "student", "lr": 1e-2, "lora": {"rank": 2}},
        "further": {**common, "student": "adapted", "lr": 1e-2, "lora": {"rank": 2}},
        "whole": {**common, "student": "further"},
        "said": {"stage": "teacher_logits", "input": "documents", "model": "served"}
        | {"encoding": {"kind": "top_k", "k": 4}},
        "measured": {"stage": "evaluate", "students": ["adapted", "further", "whole"]}
        | {"data": ["documents", "signals"]},
    }
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:12], more_steps=steps)
    served = {"step": "further", "dtype": "float32", "engine": "transformers"}
    edit_recipe(recipe, "models", "served", value=served)
    return recipe


def test_later_steps_use_an_adapter_with_its_base(recipe: TinyRecipe) -> None:
    recipe.run()
    steps = {step.name: step for step in recipe.plan()}
    metrics = {
        name: json.loads((steps[name].folder / "metrics.json").read_text())
        for name in ("adapted", "further", "whole")
    }
    assert metrics["further"]["before"] == pytest.approx(metrics["adapted"]["after"], rel=1e-5)
    assert metrics["whole"]["before"] == pytest.approx(metrics["further"]["after"], rel=1e-5)
    assert (steps["whole"].folder / "model.safetensors").is_file()
    record = read_checkpoint(steps["measured"].folder)
    assert record is not None
    for name, found in record.metrics.items():
        assert found["kl_to_teacher"] == pytest.approx(
            metrics[name]["after"]["kl_to_teacher"], rel=1e-5
        )
    for model in (*steps["further"].models.values(), *steps["said"].models.values()):
        assert model.base == steps["student"].place and model.adapter is not None
    said = teachercache(
        *("evaluate", steps["further"].folder, "--json"),
        *("--data", steps["documents"].folder, "--data", steps["signals"].folder),
    )
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert metrics["further"]["after"]["kl_to_teacher"] == pytest.approx(
        found["kl_to_teacher"], rel=1e-5
    )


def test_runs_without_lora_keep_their_names(recipe: TinyRecipe) -> None:
    (whole,) = (step for step in recipe.plan() if step.name == "whole")
    assert "lora" not in whole.identity["config"]
    (adapted,) = (step for step in recipe.plan() if step.name == "adapted")
    assert adapted.identity["config"]["lora"]["alpha"] == 4.0
    assert "lora" not in TrainConfig(max_steps=1).settings()


def test_an_adapter_on_another_adapter_is_refused(recipe: TinyRecipe) -> None:
    error = error_of(recipe, "steps.further.lora.rank=3")
    assert isinstance(error, ConfigError)
    assert str(error).startswith("steps.further.lora: 'adapted' has an adapter already, of step")
    assert error_of(recipe, "steps.further.lora.targets=[q_proj]")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lora": {"rank": 2, "targets": ["lm_head"]}}, "got 'lm_head': the loss reads head"),
        ({"lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"lora": {"rank": 2}, "objective": {"loss": "mend"}}, "lora_rank of its distiller_init"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        TrainConfig.model_validate({"max_steps": 1} | values)


def test_a_layer_that_is_not_there_is_named(data: CachedData, tmp_path: Path) -> None:
    config = changed(CONFIG, lora={"rank": 2, "targets": ["q_proj", "query"]})
    with pytest.raises(ConfigError, match=r"no layer 'query', expected some of: down_proj, gate"):
        run(data, tmp_path / "out", config)


def test_an_adapter_whose_base_has_changed_is_not_merged(data: CachedData, tmp_path: Path) -> None:
    run(data, tmp_path / "out", changed(CONFIG, max_steps=1), heldout=False)
    config = tmp_path / "out" / "adapter_config.json"
    body = json.loads(config.read_text())
    record = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    config.write_text(json.dumps(body | {"base_model_name_or_path": str(data.teacher)}))
    record["files"]["adapter_config.json"] = sha256_of(config)
    (tmp_path / "out" / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="holds other weights by now"):
        whole_model(tmp_path / "out")
