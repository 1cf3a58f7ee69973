"""The signal reaches the weights of two processes: of the one that holds the row, then of both.

Two runs of one step each, without and with one changed entry of a cache. Each process notes the
gradient at every position it reads, before any is averaged, and its weights behind the step.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.dataset import open_dataset
from stages.student.batches.step_rows import StepRows
from stages.student.batches.training_data import TrainingData
from tests.fixtures.cached_data import VOCAB_SIZE
from tests.fixtures.changed_entries import CHANGES, places_of
from tests.fixtures.objective_sources import (
    OBJECTIVES,
    Caches,
    Source,
    make_caches,
    signals_of,
    stored_row,
    with_table,
)
from tests.fixtures.position_gradients import Trained, changed_places
from tests.fixtures.signal_places import answer_places, places_in_student, row_of

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from stages.student.options import TrainOptions
from stages.student.train import work
from stages.student.train.stage import TrainConfig
from tests.fixtures.position_gradients import Trained, Watch

load_start = work.load_start


def carry_out(job):
    watch, models = Watch(), []

    def load_and_watch(*arguments):
        model, reader = load_start(*arguments)
        watch.on(reader or model)
        models.append(model)
        return model, reader

    work.load_start = load_and_watch
    config = TrainConfig(max_steps=1, per_device_batch_size=2, objective=job["objective"],
                         packing=job["packing"])
    options = TrainOptions(num_workers=0, log_every=1, micro_batch_tokens=100_000)
    output = Path(job["output"])
    work.train(config, student=Path(job["student"]), data=[Path(name) for name in job["data"]],
               lm_data=[Path(name) for name in job["lm_data"]], output=output, options=options,
               reader=Path(job["reader"]) if job["reader"] else None, heldout=False)
    weights = {name: weight.detach() for name, weight in models[0].named_parameters()}
    found = {"gradients": watch.gradients(), "weights": weights}
    torch.save(found, output / f"rank-{os.environ['RANK']}.pt")

for job in json.loads(sys.argv[1]):
    carry_out(job)
"""
HOLDER = 1  # the process of whose rows one is changed
# By name: an objective, the signal of which an entry is changed, and whether rows are packed.
CASES = {
    "-".join([loss, table, *(["packed"] if packing else [])]): (loss, table, packing)
    for loss, objective in OBJECTIVES.items()
    for table in signals_of(loss)
    for packing in ([False, True] if objective.PACKS else [False])
}


def variant_of(table: str) -> str:
    """The variant of a table that is changed: the first."""
    return next(variant for name, variant in CHANGES if name == table)


def held_row(source: Source, loss: str) -> Any:
    """The first row that ``HOLDER`` reads."""
    dataset = open_dataset(source.data, split="train")
    text = open_dataset(source.lm_data, split="train") if source.lm_data else None
    objective = OBJECTIVES[loss].model_validate({"loss": loss, **source.objective})
    rows, _ = objective.batches(TrainingData(dataset, text, VOCAB_SIZE, seed=0))
    order = StepRows(len(rows), batch_size=2, accumulation=1, seed=0, rank=HOLDER, world_size=2)
    return rows[next(iter(order))[0]]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Caches:
    return make_caches(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="module")
def runs(caches: Caches, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case, in it one for the run without the change and one for that with it.

    The processes are started once, and carry out all runs.
    """
    folder = tmp_path_factory.mktemp("runs")
    jobs = []
    for name, (loss, table, packing) in CASES.items():
        variant = variant_of(table)
        source = caches.source(loss, table, variant)
        sample_id = row_of(loss, table, held_row(source, loss))["sample_id"]
        stored = stored_row(source, table, sample_id)
        other = next(iter(CHANGES[table, variant].values()))(stored, places_of(stored)[0])
        changed = with_table(
            source, table, folder / f"{name}-table", sample_id, lambda _, r=other: r
        )
        for run, given in (("before", source), ("after", changed)):
            job = {
                "objective": {"loss": loss, **given.objective},
                "packing": packing,
                "student": str(given.student),
                "reader": str(given.reader or ""),
                "data": [str(path) for path in given.data],
                "lm_data": [str(path) for path in given.lm_data],
                "output": str(folder / name / run),
            }
            jobs.append(job)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(script), json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def noted(folder: Path, rank: int) -> Trained:
    found = torch.load(folder / f"rank-{rank}.pt", weights_only=True)
    return Trained(found["gradients"], found["weights"], rows=[], counts={})


def same_weights(one: Trained, other: Trained) -> bool:
    return all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_the_holder_of_the_row_has_the_change_and_both_have_its_weights(
    caches: Caches, runs: Path, case: str
) -> None:
    loss, table, _ = CASES[case]
    variant = variant_of(table)
    source = caches.source(loss, table, variant)
    row = row_of(loss, table, held_row(source, loss))
    before, after = (
        [noted(runs / case / run, rank) for rank in (0, 1)] for run in ("before", "after")
    )
    assert before[0].gradients and not changed_places(before[0], after[0])
    moved = changed_places(before[HOLDER], after[HOLDER])
    if table in ("teacher_logits", "advantages", "response_token_logprobs"):
        p = places_of(stored_row(source, table, row["sample_id"]))[0]
        assert list(moved) == [places_in_student(loss, row)[p]]
    else:
        assert moved and set(moved) <= answer_places(table, row)
    for ranks in (before, after):
        assert same_weights(*ranks)
    assert not same_weights(before[0], after[0])
