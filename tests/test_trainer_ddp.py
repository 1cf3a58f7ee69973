"""Two processes are one with double batches: the same losses, weights and held-out numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.cached_data import CachedData, make_cached_data

SCRIPT = """
import json, sys
from pathlib import Path
from stages.student.train_config import KdConfig, TrainConfig, TrainOptions
from stages.student.trainer import train

root, output, batch, accumulate = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5])
config = TrainConfig(max_steps=16 // (int(sys.argv[5]) * batch * accumulate), lr=3e-3,
                     per_device_batch_size=batch, gradient_accumulation_steps=accumulate,
                     objective=KdConfig(weight=0.5))
seen = []
result = train(config, student=root / "student", data=[root / "documents", root / "threshold"],
               output=output, options=TrainOptions(num_workers=0, log_every=1), fingerprint="same",
               on_event=lambda event: seen.append(event["event"]))
(output / f"seen-{len(seen)}").write_text("")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


def run(data: CachedData, output: Path, *, processes: int, batch: int, accumulate: int) -> Any:
    script = output.with_suffix(".py")
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), str(data.root)]
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
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one_with_double_batches(
    data: CachedData, tmp_path: Path, accumulate: int
) -> None:
    """Rows of 2 to 24 tokens, so an average of per-process means would be elsewhere.

    The order of summation differs, and AdamW turns the last bits of a gradient near zero into up
    to lr of a weight; hence 1e-5 on losses and a hundredth of lr on weights.
    """
    one = run(data, tmp_path / "one", processes=1, batch=4, accumulate=accumulate)
    two = run(data, tmp_path / "two", processes=2, batch=2, accumulate=accumulate)
    for here, there in zip(one["history"], two["history"], strict=True):
        for name in ("loss", "kl", "cross_entropy", "grad_norm", "num_tokens"):
            assert there[name] == pytest.approx(here[name], rel=1e-5), name
    for split in ("before", "after"):
        assert two["metrics"][split] == pytest.approx(one["metrics"][split], rel=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        assert float((tensor - weights[1][name]).abs().max()) < 3e-5, name
    seen = sorted(path.name for path in (tmp_path / "two").glob("seen-*"))
    assert seen[0] == "seen-0" and len(seen) == 2  # events reach one process only
