"""Processes of one configuration are one process: the same losses, weights, held-out numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.fixtures.episode_data import EpisodeData, make_episode_data
from tests.fixtures.preference_data import PreferenceData, make_preference_data

SCRIPT = """
import json, sys
from pathlib import Path
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train

job, output = json.loads(sys.argv[1]), Path(sys.argv[2])
batch, accumulate, steps = map(int, sys.argv[3:6])
config = TrainConfig(max_steps=steps, lr=3e-3,
                     per_device_batch_size=batch, gradient_accumulation_steps=accumulate,
                     objective=job["objective"])
seen = []
options = TrainOptions(num_workers=0, log_every=1, micro_batch_tokens=60)
result = train(config, student=Path(job["student"]), data=[Path(name) for name in job["data"]],
               lm_data=[Path(name) for name in job["lm_data"]], output=output, options=options,
               fingerprint="same", on_event=lambda event: seen.append(event["event"]))
(output / f"seen-{len(seen)}").write_text("")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EpisodeData:
    return make_episode_data(tmp_path_factory.mktemp("cache"), encodings=("threshold",))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PreferenceData:
    return make_preference_data(tmp_path_factory.mktemp("pairs"))


def pair_job_of(data: PreferenceData, objective: dict[str, Any]) -> dict[str, Any]:
    """The same of a preference objective."""
    tables = {"dpo": data.dpo, "dckd": data.dckd("threshold"), "adpa": data.adpa("threshold")}
    return {
        "objective": objective,
        "student": str(data.student),
        "data": [str(path) for path in tables[objective["loss"]]],
        "lm_data": [],
    }


def job_of(data: EpisodeData, objective: dict[str, Any]) -> dict[str, Any]:
    """What a run reads, as JSON."""
    tables, texts = data.text.tables("threshold"), []
    if objective["loss"] == "bialign":
        tables = data.bialign("threshold")
    if objective["loss"] == "icl_distillation":
        tables, texts = data.icl, tables if objective["lm_weight"] else []
    return {
        "objective": objective,
        "student": str(data.student),
        "data": [str(path) for path in tables],
        "lm_data": [str(path) for path in texts],
    }


def run(job: dict[str, Any], output: Path, processes: int, numbers: tuple[int, ...]) -> Any:
    script = output.with_suffix(".py")
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), json.dumps(job)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, str(output), *map(str, numbers)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((output / "checkpoint.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "processes", "numbers"),
    [
        ({"loss": "kd", "weight": 0.5}, 2, (4, 1, 4)),
        ({"loss": "kd", "weight": 0.5}, 2, (4, 2, 3)),  # the third step has 2 of 8 rows
        ({"loss": "bialign"}, 2, (3, 2, 3)),
        ({"loss": "bialign"}, 3, (3, 1, 7)),  # the sixth step has 1 row: two processes have none
        ({"loss": "icl_distillation", "lm_weight": 0.0}, 2, (4, 1, 4)),
        ({"loss": "icl_distillation", "lm_weight": 0.2}, 2, (4, 2, 2)),
    ],
)
def test_several_processes_equal_one(
    data: EpisodeData,
    tmp_path: Path,
    objective: dict[str, Any],
    processes: int,
    numbers: tuple[int, ...],
) -> None:
    """``numbers`` are rows a batch, batches a step, and steps.

    Rows of 2 to 24 tokens, so an average of per-process means would be elsewhere.

    The order of summation differs, and AdamW turns the last bits of a gradient near zero into up
    to lr of a weight; hence 1e-5 on losses and a hundredth of lr on weights.
    """
    assert_one_run(job_of(data, objective), tmp_path, processes, numbers)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "dckd", "adpa"])
def test_several_processes_equal_one_on_preferences(
    pairs: PreferenceData, tmp_path: Path, loss: str
) -> None:
    assert_one_run(pair_job_of(pairs, {"loss": loss}), tmp_path, 2, (4, 2, 2))


def assert_one_run(
    job: dict[str, Any], tmp_path: Path, processes: int, numbers: tuple[int, ...]
) -> None:
    one = run(job, tmp_path / "one", 1, numbers)
    several = run(job, tmp_path / "several", processes, numbers)
    for here, there in zip(one["history"], several["history"], strict=True):
        assert there == pytest.approx(here, rel=1e-5, abs=1e-6)  # an advantage may be near 0
    for name in ("tokens", "samples", "steps"):
        assert several["metrics"]["train"][name] == one["metrics"]["train"][name]
    for split in ("before", "after"):
        assert several["metrics"][split] == pytest.approx(one["metrics"][split], rel=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "several")]
    for name, tensor in weights[0].items():
        assert float((tensor - weights[1][name]).abs().max()) < 3e-5, name
    seen = sorted(path.name for path in (tmp_path / "several").glob("seen-*"))
    assert seen[0] == "seen-0" and len(seen) == 2  # events reach one process only
