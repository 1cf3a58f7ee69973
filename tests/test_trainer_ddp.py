"""Two processes are one with double batches: the same losses, weights and held-out numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.episode_data import EpisodeData, make_episode_data
from tests.preference_data import PreferenceData, make_preference_data

SCRIPT = """
import json, sys
from pathlib import Path
from stages.student.train_config import TrainConfig, TrainOptions
from stages.student.trainer import train

job, output = json.loads(sys.argv[1]), Path(sys.argv[2])
batch, accumulate, processes = map(int, sys.argv[3:6])
config = TrainConfig(max_steps=16 // (processes * batch * accumulate), lr=3e-3,
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


def run(job: dict[str, Any], output: Path, *, processes: int, batch: int, accumulate: int) -> Any:
    script = output.with_suffix(".py")
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), json.dumps(job)]
    numbers = [str(batch), str(accumulate), str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, str(output), *numbers],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((output / "checkpoint.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "accumulate"),
    [
        ({"loss": "kd", "weight": 0.5}, 1),
        ({"loss": "kd", "weight": 0.5}, 2),
        ({"loss": "bialign"}, 2),
        ({"loss": "icl_distillation", "lm_weight": 0.0}, 1),
        ({"loss": "icl_distillation", "lm_weight": 0.2}, 2),
    ],
)
def test_two_processes_equal_one_with_double_batches(
    data: EpisodeData, tmp_path: Path, objective: dict[str, Any], accumulate: int
) -> None:
    """Rows of 2 to 24 tokens, so an average of per-process means would be elsewhere.

    The order of summation differs, and AdamW turns the last bits of a gradient near zero into up
    to lr of a weight; hence 1e-5 on losses and a hundredth of lr on weights.
    """
    assert_two_are_one(job_of(data, objective), tmp_path, accumulate)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "dckd", "adpa"])
def test_two_processes_equal_one_on_preferences(
    pairs: PreferenceData, tmp_path: Path, loss: str
) -> None:
    assert_two_are_one(pair_job_of(pairs, {"loss": loss}), tmp_path, 2)


def assert_two_are_one(job: dict[str, Any], tmp_path: Path, accumulate: int) -> None:
    one = run(job, tmp_path / "one", processes=1, batch=4, accumulate=accumulate)
    two = run(job, tmp_path / "two", processes=2, batch=2, accumulate=accumulate)
    for here, there in zip(one["history"], two["history"], strict=True):
        assert there == pytest.approx(here, rel=1e-5, abs=1e-6)  # an advantage may be near 0
    for split in ("before", "after"):
        assert two["metrics"][split] == pytest.approx(one["metrics"][split], rel=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        assert float((tensor - weights[1][name]).abs().max()) < 3e-5, name
    seen = sorted(path.name for path in (tmp_path / "two").glob("seen-*"))
    assert seen[0] == "seen-0" and len(seen) == 2  # events reach one process only
