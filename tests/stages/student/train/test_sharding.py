"""FSDP: a student divided over two processes has the losses and weights of one process.

Processes take longer to start than to train: two are started once, and carry out all runs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.errors import ConfigError
from stages.models.checkpoints.checkpoint import CheckpointRecord, read_checkpoint
from stages.student.options import TrainOptions
from stages.student.train.sharding import require_same_sharding
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train
from tests.fixtures.cached_data import CachedData, make_cached_data, save_model, spans_table
from tests.fixtures.preference_data import PreferenceData, make_preference_data
from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe, teachercache

SCRIPT = """
import json, os, shutil, sys
from pathlib import Path
import torch
from stages.student.options import TrainOptions
from stages.student.train import work
from stages.student.train.stage import TrainConfig

measure = work.measure_student

def measured(model, held_out):
    held.append({name: [weight.numel(), weight.to_local().numel()]
                 for name, weight in model.named_parameters()})
    return measure(model, held_out)

work.measure_student = measured
for job in json.loads(sys.argv[1]):
    held, output = [], Path(job["output"])
    left = Path(str(output) + "-killed")

    def keep(checkpoint):  # what a run leaves that is killed now
        if checkpoint.name == "checkpoint-2" and not left.exists():
            shutil.copytree(output, left)

    options = TrainOptions(num_workers=0, log_every=1, checkpoint_every=2, eval_batch_size=1,
                           sharding="full")
    config = TrainConfig.model_validate(job["config"])
    folders = [Path(name) for name in job["data"]]
    for place in (output, left) if job["again"] else (output,):
        work.train(config, student=Path(job["student"]), data=folders, output=place,
                   options=options, fingerprint="same", on_checkpoint=keep)
        torch.distributed.barrier()
    (output / f"held-{os.environ['RANK']}.json").write_text(json.dumps(held[0]))
"""
KD = {"lr": 3e-3, "max_steps": 5, "per_device_batch_size": 2, "gradient_accumulation_steps": 4}
CASES: dict[str, dict[str, Any]] = {
    "kd": KD | {"objective": {"loss": "kd", "weight": 0.5}},  # its second step has 1 of 8 rows
    "untied": KD | {"max_steps": 3},
    "bfloat16": KD | {"max_steps": 3, "dtype": "bfloat16"},
    "packed": KD | {"max_steps": 2, "packing": True, "gradient_checkpointing": True},
    "dckd": KD | {"max_steps": 2, "objective": {"loss": "dckd"}},
    "opd": KD | {"max_steps": 2, "objective": {"loss": "opd", "max_staleness": 5.0}},
    "alm": KD | {"max_steps": 2, "objective": {"loss": "alm", "entries_weight": 0.5}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    data = make_cached_data(tmp_path_factory.mktemp("cache"))
    untied = data.root / "untied"
    save_model(untied, seed=2, num_layers=2)
    config = AutoConfig.from_pretrained(untied, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(untied)
    return data


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PreferenceData:
    return make_preference_data(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def runs(
    data: CachedData, pairs: PreferenceData, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Where a case's run by one process lies, and the one by two that share the student."""
    folder, jobs = tmp_path_factory.mktemp("runs"), []
    for name, config in CASES.items():
        student, tables = data.student, data.tables("threshold")
        if name == "dckd":
            student, tables = pairs.student, pairs.dckd("threshold")
        if name == "opd":
            student, tables = pairs.student, pairs.opd
        if name == "alm":
            tables = [spans_table(data, "entries")]
        if name == "untied":
            student = data.root / "untied"
        options = TrainOptions(num_workers=0, log_every=1)
        settings = TrainConfig.model_validate(config)
        train(
            settings,
            student=student,
            data=tables,
            output=folder / name,
            fingerprint="same",
            options=options,
        )
        output = str(folder / f"{name}-divided")
        job = {"config": config, "student": str(student), "again": name in ("kd", "untied")}
        jobs.append(job | {"data": [str(path) for path in tables], "output": output})
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, *launcher, str(script), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return lambda name: (folder / name, folder / f"{name}-divided")


def record_of(folder: Path) -> CheckpointRecord:
    record = read_checkpoint(folder)
    assert record is not None
    return record


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_divided_student_is_the_student(
    runs: Callable[[str], tuple[Path, Path]], case: str
) -> None:
    """The order of summation differs, and products of bfloat16 are rounded: hence the limits."""
    alone, together = runs(case)
    one, two = record_of(alone), record_of(together)
    limit = 1e-5 if case != "bfloat16" else 1e-2
    for here, there in zip(one.history, two.history, strict=True):
        assert there == pytest.approx(here, rel=limit, abs=1e-6)
    for split in ("before", "after"):
        assert two.metrics[split] == pytest.approx(one.metrics[split], rel=max(1e-4, limit))
    assert sorted(one.files) == sorted(two.files)
    weights = [load_file(folder / "model.safetensors") for folder in (alone, together)]
    assert sorted(weights[0]) == sorted(weights[1])
    if case != "bfloat16":
        for name, tensor in weights[0].items():
            assert float((tensor - weights[1][name]).abs().max()) < 3e-5, name


@pytest.mark.slow
def test_each_process_holds_its_part(runs: Callable[[str], tuple[Path, Path]]) -> None:
    _, together = runs("kd")
    held = [json.loads((together / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    for name, (whole, part) in held[0].items():
        assert part + held[1][name][1] == whole and abs(2 * part - whole) <= whole / 8, name


@pytest.mark.slow
@pytest.mark.parametrize("case", ["kd", "untied"])
def test_a_killed_run_goes_on(runs: Callable[[str], tuple[Path, Path]], case: str) -> None:
    """To the last bit, from what lay in its folder after a checkpoint."""
    _, together = runs(case)
    killed = together.with_name(f"{together.name}-killed")
    assert record_of(killed).history == record_of(together).history
    assert record_of(killed).metrics["before"] == record_of(together).metrics["before"]
    weights = [record_of(folder).files["model.safetensors"] for folder in (killed, together)]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["kd", "untied"])
def test_transformers_loads_it(runs: Callable[[str], tuple[Path, Path]], case: str) -> None:
    alone, together = runs(case)
    assert (alone / "config.json").read_text() == (together / "config.json").read_text()
    ids_BT = torch.arange(1, 9)[None]
    one, two = (
        AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids_BT).logits
        for folder in (alone, together)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_run_goes_on_as_it_was_divided(tmp_path: Path) -> None:
    """What an optimizer's state lies in is another file; without it Adam would begin anew."""
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "optimizer.bin").touch()
    require_same_sharding(checkpoint, "full")
    require_same_sharding(None, "none")
    with pytest.raises(ConfigError, match=r"was written with execution\.training_sharding: full,"):
        require_same_sharding(checkpoint, "none")
    (checkpoint / "optimizer.bin").rename(checkpoint / "optimizer.pt")
    with pytest.raises(ConfigError, match=r"sharding: none, this run has 'full': go on with none"):
        require_same_sharding(checkpoint, "full")


@pytest.mark.parametrize(
    ("settings", "processes", "problem"),
    [
        ({}, 1, "training_processes is 1: give it two or more"),
        ({"objective": {"loss": "dpo"}}, 2, "objective 'dpo' is not one forward of the student"),
        ({"lora": {"rank": 2}}, 2, "lora trains few weights"),
        ({"early_stopping": {"patience": 1, "every": 1}}, 2, "early_stopping keeps whole weights"),
        ({"optimizer": "adafactor"}, 2, "optimizer 'adafactor' reads whole weights: take adamw"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    settings: dict[str, Any], processes: int, problem: str
) -> None:
    config = TrainConfig.model_validate({"max_steps": 1} | settings)
    with pytest.raises(ConfigError, match=f"^execution.training_sharding is full, but {problem}"):
        config.require_shards(processes)


@pytest.fixture
def recipe(tiny_model: Path, paragraphs: list[str], tmp_path: Path) -> TinyRecipe:
    steps = {
        "trained": {"stage": "train", "student": "teacher", "data": ["documents", "signals"]}
        | {"max_steps": 1}
    }
    return make_recipe(tmp_path, tiny_model, paragraphs[:12], more_steps=steps)


@pytest.mark.usefixtures("own_cache")
def test_it_is_refused_before_anything_runs(recipe: TinyRecipe) -> None:
    said = teachercache("run", recipe.path, "--set", "execution.training_sharding=full")
    assert said.code == 2 and not recipe.root.exists()
    assert said.error == (
        "steps.trained: execution.training_sharding is full, but training_processes is 1: give it "
        "two or more"
    )
    said = teachercache("run", recipe.path, "--set", "execution.training_sharding=half")
    assert said.code == 2 and "expected 'none' or 'full'" in said.error
