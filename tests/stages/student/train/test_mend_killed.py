"""A MEND run whose process is killed goes on: the same losses, held-out numbers and weights."""

import json
import os
from pathlib import Path

import pytest

from stages.models.checkpoints.checkpoint import read_checkpoint
from tests.fixtures.demonstration_data import make_mend_data
from tests.fixtures.tiny_recipe import Said, finish
from tests.servers.warm_python import WarmProcess

KILL_ITSELF = """
import json, os, sys
from pathlib import Path
from stages.student.objectives.mend import MendConfig
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train

root, kill_at = Path(sys.argv[1]), int(sys.argv[3])

def on_event(event):
    if event["event"] == "start":
        print(event["step"])
    if event["event"] == "step" and event["step"] == kill_at:
        os.kill(os.getpid(), 9)

config = TrainConfig(max_steps=6, lr=3e-3, per_device_batch_size=4, objective=MendConfig())
options = TrainOptions(num_workers=1, log_every=1, checkpoint_every=2)
for output in sys.argv[2].split(","):
    result = train(config, student=root / "distiller", reader=root / "teacher",
                   data=[root / "episodes", root / "episodes_threshold"],
                   output=Path(output), options=options, on_event=on_event)
    print(json.dumps([[entry["loss"], entry["answer_cross_entropy"]] for entry in result.history]))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses_and_weights(tmp_path: Path) -> None:
    """Killed between checkpoints; the second process makes a whole run too, to compare with."""
    root = make_mend_data(tmp_path, ("threshold",), ("episodes",)).root

    def trained(kill_at: int, *outputs: str) -> Said:
        folders = ",".join(str(tmp_path / output) for output in outputs)
        words = ["-c", str(root), folders, str(kill_at)]
        return finish(WarmProcess(KILL_ITSELF, words, dict(os.environ)))

    assert trained(5, "killed").code == -9
    assert (tmp_path / "killed").is_dir() and read_checkpoint(tmp_path / "killed") is None
    said = trained(-1, "killed", "whole")
    assert said.code == 0, said.err
    begun, resumed, at_first, whole = map(json.loads, said.out.splitlines())
    assert (begun, at_first) == (4, 0)
    assert resumed == whole and len({loss for loss, _ in whole}) == 6
    records = [read_checkpoint(tmp_path / name) for name in ("killed", "whole")]
    assert records[0] is not None and records[1] is not None
    assert records[0].files["model.safetensors"] == records[1].files["model.safetensors"]
    for split in ("before", "after"):
        assert records[0].metrics[split] == records[1].metrics[split]
