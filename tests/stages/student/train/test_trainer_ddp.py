"""Processes of one configuration are one process: the same losses, weights, held-out numbers.

A process takes longer to start than to train: each number of processes is started once, and carries
out every run that is asked of it, one after the other.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.fixtures.demonstration_data import MendData, make_mend_data, make_models
from tests.fixtures.episode_data import EpisodeData, make_episode_data
from tests.fixtures.preference_data import PreferenceData, make_preference_data

SCRIPT = """
import json, sys
from pathlib import Path
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train


def carry_out(job):
    batch, accumulate, steps = job["numbers"]
    config = TrainConfig(max_steps=steps, lr=3e-3,
                         per_device_batch_size=batch, gradient_accumulation_steps=accumulate,
                         objective=job["objective"], lora=job.get("lora"))
    output, seen = Path(job["output"]), []
    options = TrainOptions(num_workers=0, log_every=1, micro_batch_tokens=60)
    train(config, student=Path(job["student"]), data=[Path(name) for name in job["data"]],
          lm_data=[Path(name) for name in job["lm_data"]], output=output, options=options,
          reader=Path(job["reader"]) if "reader" in job else None,
          fingerprint="same", on_event=lambda event: seen.append(event["event"]))
    (output / f"seen-{len(seen)}").write_text("")

for job in json.loads(sys.argv[1]):
    carry_out(job)
"""
# By name: an objective, how many processes there are, and rows a batch, batches a step, steps.
Case = tuple[dict[str, Any], int, tuple[int, int, int]]
CASES: dict[str, Case] = {
    "kd": ({"loss": "kd", "weight": 0.5}, 2, (4, 1, 4)),
    "kd-last": ({"loss": "kd", "weight": 0.5}, 2, (4, 2, 3)),  # its third step has 2 of 8 rows
    "kd-adapter": ({"loss": "kd", "weight": 0.5}, 2, (4, 2, 3)),
    "bialign": ({"loss": "bialign"}, 2, (3, 2, 3)),
    # The sixth step has 1 row: two processes have none.
    "bialign-none": ({"loss": "bialign"}, 3, (3, 1, 7)),
    "icl": ({"loss": "icl_distillation", "lm_weight": 0.0}, 2, (4, 1, 4)),
    "icl-lm": ({"loss": "icl_distillation", "lm_weight": 0.2}, 2, (4, 2, 2)),
    "dpo": ({"loss": "dpo"}, 2, (4, 2, 2)),
    "dckd": ({"loss": "dckd"}, 2, (4, 2, 2)),
    "adpa": ({"loss": "adpa"}, 2, (4, 2, 2)),
    "mend": ({"loss": "mend"}, 2, (3, 2, 4)),  # its third step has 2 of 6 rows
    "mend-lora": ({"loss": "mend"}, 2, (3, 2, 2)),
}
PAIRS = ("dpo", "dckd", "adpa")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EpisodeData:
    return make_episode_data(tmp_path_factory.mktemp("cache"), encodings=("threshold",))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PreferenceData:
    return make_preference_data(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> MendData:
    return make_mend_data(tmp_path_factory.mktemp("mend"), ("threshold",), ("episodes",))


def pair_job_of(data: PreferenceData, objective: dict[str, Any]) -> dict[str, Any]:
    """The same of a preference objective."""
    tables = {"dpo": data.dpo, "dckd": data.dckd("threshold"), "adpa": data.adpa("threshold")}
    return {
        "objective": objective,
        "student": str(data.student),
        "data": [str(path) for path in tables[objective["loss"]]],
        "lm_data": [],
    }


def mend_job_of(data: MendData, objective: dict[str, Any], lora_rank: int) -> dict[str, Any]:
    """The same of a distiller and its reader."""
    models = data.models
    if lora_rank:
        models = make_models(data.root / "lora", distiller_width=24, lora_rank=lora_rank)
    return {
        "objective": objective,
        "student": str(models.distiller),
        "reader": str(data.models.teacher),
        "data": [str(path) for path in data.tables("episodes", "threshold")],
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


@pytest.fixture(scope="module")
def runs(
    data: EpisodeData,
    pairs: PreferenceData,
    demonstrations: MendData,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, Path]]:
    """Where a case's run by one process lies, and the one by several."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def carried_out(processes: int) -> Path:
        """Carry out the cases of so many processes; with one, all of them."""
        output = folder / str(processes)
        output.mkdir()
        jobs = []
        for name, (objective, asked, numbers) in CASES.items():
            if processes in (1, asked):
                if name in PAIRS:
                    job = pair_job_of(pairs, objective)
                elif objective["loss"] == "mend":
                    job = mend_job_of(demonstrations, objective, 2 if name == "mend-lora" else 0)
                else:
                    job = job_of(data, objective)
                if name == "kd-adapter":
                    job["lora"] = {"rank": 4}
                jobs.append({**job, "output": str(output / name), "numbers": numbers})
        start(jobs, output / "script.py", processes)
        return output

    return lambda name: (carried_out(1) / name, carried_out(CASES[name][1]) / name)


def start(jobs: list[dict[str, Any]], script: Path, processes: int) -> None:
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name not in PAIRS])
def test_several_processes_equal_one(
    runs: Callable[[str], tuple[Path, Path]],
    case: str,
) -> None:
    """Rows of 2 to 24 tokens, so an average of per-process means would be elsewhere.

    The order of summation differs, and AdamW turns the last bits of a gradient near zero into up
    to lr of a weight; hence 1e-5 on losses and a hundredth of lr on weights.
    """
    assert_one_run(*runs(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", PAIRS)
def test_several_processes_equal_one_on_preferences(
    runs: Callable[[str], tuple[Path, Path]], case: str
) -> None:
    assert_one_run(*runs(case))


def assert_one_run(alone: Path, together: Path) -> None:
    one, several = (
        json.loads((path / "checkpoint.json").read_text()) for path in (alone, together)
    )
    for here, there in zip(one["history"], several["history"], strict=True):
        assert there == pytest.approx(here, rel=1e-5, abs=1e-6)  # an advantage may be near 0
    for name in ("tokens", "samples", "steps"):
        assert several["metrics"]["train"][name] == one["metrics"]["train"][name]
    for split in ("before", "after"):
        assert several["metrics"][split] == pytest.approx(one["metrics"][split], rel=1e-4)
    weights = [load_file(next(path.glob("*.safetensors"))) for path in (alone, together)]
    for name, tensor in weights[0].items():
        assert float((tensor - weights[1][name]).abs().max()) < 3e-5, name
    seen = sorted(path.name for path in together.glob("seen-*"))
    assert seen[0] == "seen-0" and len(seen) == 2  # events reach one process only
