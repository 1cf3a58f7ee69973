"""Early stopping: where a run stops, whose weights are kept, and runs that are killed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.errors import ConfigError
from stages.models.checkpoints.adapters import whole_model
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.student.evaluate.positions import evaluate
from stages.student.options import TrainOptions
from stages.student.train.early_stopping import course_of
from stages.student.train.stage import EarlyStopping, TrainConfig
from stages.student.train.work import TrainResult, train
from tests.fixtures.cached_data import CachedData, make_cached_data
from tests.fixtures.tiny_recipe import Said, TinyRecipe, error_of, finish, make_recipe
from tests.servers.warm_python import WarmProcess

OPTIONS = TrainOptions(num_workers=0, log_every=1, checkpoint_every=2)
STOPPING = {"patience": 2, "every": 2}
# A rate at which the 18 rows are soon known by heart.
CONFIG = TrainConfig.model_validate(
    {"max_steps": 60, "lr": 2e-2, "per_device_batch_size": 4, "early_stopping": STOPPING}
    | {"scheduler": "constant_with_warmup"}
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


def run(data: CachedData, output: Path, config: TrainConfig = CONFIG, **more: Any) -> TrainResult:
    tables = data.tables("threshold")
    return train(config, student=data.student, data=tables, output=output, options=OPTIONS, **more)


def measured(result: TrainResult) -> dict[int, float]:
    """KL on held-out rows by step, as the history has it."""
    name = "eval_kl_to_teacher"
    return {int(entry["step"]): entry[name] for entry in result.history if name in entry}


def expected_stop(found: dict[int, float]) -> tuple[int, int]:
    """The step of the best and that of the stop, found from the curve as a person would."""
    steps = sorted(found)
    best = steps[0]
    for step in steps[1:]:
        if found[step] < found[best]:
            best = step
        elif steps.index(step) - steps.index(best) == STOPPING["patience"]:
            return best, step
    return best, steps[-1]


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
@pytest.mark.usefixtures("own_cache")
@pytest.mark.slow
def test_a_run_stops_and_keeps_its_best_weights(
    data: CachedData, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    result = run(
        data, tmp_path / "out", TrainConfig.model_validate(CONFIG.model_dump() | {"lora": lora})
    )
    found, summary = measured(result), result.metrics["train"]
    best, stop = expected_stop(found)
    assert (summary["best_step"], summary["steps"]) == (best, stop)
    assert [e["step"] for e in result.history if "loss" in e] == list(range(1, stop + 1))
    assert best < stop < 60 and list(found) == list(range(2, stop + 1, 2))
    assert summary["best_kl_to_teacher"] == found[best] == min(found.values())
    assert result.metrics["after"]["kl_to_teacher"] == pytest.approx(found[best], rel=1e-5)
    kept = evaluate(whole_model(tmp_path / "out"), data.tables("threshold"))
    assert kept["kl_to_teacher"] == pytest.approx(found[best], rel=1e-5)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["train"]["best_step"] == best
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.slow
def test_without_a_stop_the_best_weights_are_kept_too(data: CachedData, tmp_path: Path) -> None:
    settings = {"early_stopping": {"patience": 50, "every": 2}, "max_steps": 21}
    result = run(data, tmp_path / "out", TrainConfig.model_validate(CONFIG.model_dump() | settings))
    found = measured(result)
    assert result.metrics["train"]["steps"] == 21 and max(found) == 20
    assert result.metrics["after"]["kl_to_teacher"] == pytest.approx(min(found.values()), rel=1e-5)


def test_the_course_of_a_log() -> None:
    values = (3.0, 2.0, 1.95, 1.9, 2.5)
    log = [{"step": 5 * i, "eval_kl_to_teacher": v} for i, v in enumerate(values, 1)]
    course = course_of([{"step": 1, "loss": 9.0}, *log], 0.0)
    assert (course.step, course.best, course.waited) == (20, 1.9, 1)
    course = course_of(log, 0.2)  # none of the later ones is lower by so much
    assert (course.step, course.best, course.waited) == (10, 2.0, 3)
    assert not course_of([{"step": 1, "loss": 9.0}], 0.0).found


class Stopped(Exception):
    """What a test throws from ``on_event`` to stop a run."""


@pytest.mark.slow
def test_a_run_that_ends_after_its_stop_is_not_trained_further(
    data: CachedData, tmp_path: Path
) -> None:
    """The last checkpoint is of the very step at which it stopped."""

    def stop_at_the_end(event: dict[str, Any]) -> None:
        if event["event"] == "after":
            raise Stopped

    whole = run(data, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(data, tmp_path / "out", on_event=stop_at_the_end)
    again = run(data, tmp_path / "out")
    assert again.history == whole.history and again.metrics["after"] == whole.metrics["after"]
    for name in ("steps", "best_step", "best_kl_to_teacher"):
        assert again.metrics["train"][name] == whole.metrics["train"][name]


KILL_ITSELF = """
import json, os, sys
from pathlib import Path
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train

def on_event(event):
    if event["event"] == "step" and event["step"] == int(sys.argv[3]):
        os.kill(os.getpid(), 9)

root = Path(sys.argv[1])
config = TrainConfig.model_validate_json(sys.argv[4])
options = TrainOptions(num_workers=0, log_every=1, checkpoint_every=3)
for output in sys.argv[2].split(","):
    result = train(config, student=root / "student", data=[root / "documents", root / "threshold"],
                   output=Path(output), options=options, on_event=on_event)
    print(int(result.metrics["train"]["steps"]), int(result.metrics["train"]["best_step"]))
"""


@pytest.mark.slow
def test_a_killed_run_stops_where_it_would_have(data: CachedData, tmp_path: Path) -> None:
    """Killed after its best and before its stop; its best weights come from the checkpoint."""
    whole = run(data, tmp_path / "whole")
    best, stop = expected_stop(measured(whole))

    def trained(kill_at: int, *outputs: str) -> Said:
        folders = ",".join(str(tmp_path / output) for output in outputs)
        words = ["-c", str(data.root), folders, str(kill_at), CONFIG.model_dump_json()]
        return finish(WarmProcess(KILL_ITSELF, words, dict(os.environ)))

    assert trained(stop, "killed").code == -9
    (tmp_path / "killed" / "checkpoints" / "best" / "model.safetensors").write_bytes(b"torn")
    said = trained(-1, "killed", "other")
    assert said.code == 0, said.err
    assert said.out.splitlines() == [f"{stop} {best}"] * 2
    records = [read_checkpoint(tmp_path / name) for name in ("killed", "other")]
    assert records[0] is not None and records[1] is not None
    assert records[0].history == records[1].history
    assert records[0].files["model.safetensors"] == records[1].files["model.safetensors"]


def test_a_measurement_that_is_no_number_ends_the_run(data: CachedData, tmp_path: Path) -> None:
    """It would be the lowest for ever, and its weights the ones that are kept."""
    broken = CONFIG.model_copy(
        update={
            "lr": 1e9,
            "max_grad_norm": 0.0,
            "warmup": 0.0,
            "early_stopping": EarlyStopping(patience=1, every=1),
        }
    )
    with pytest.raises(ConfigError, match=r"no finite number|not finite"):
        run(data, tmp_path / "out", broken)


def test_epochs_that_are_never_measured_are_refused(data: CachedData, tmp_path: Path) -> None:
    config = {"epochs": 1, "early_stopping": {"patience": 1, "every": 100}}
    with pytest.raises(ConfigError, match=r"every is 100, and the run has \d+ steps"):
        run(data, tmp_path / "out", TrainConfig.model_validate(config))


def test_data_that_holds_nothing_out_is_refused(data: CachedData, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="measures held-out rows, and the data has none"):
        run(data, tmp_path / "out", heldout=False)


def test_a_recipe_that_holds_nothing_out_is_refused_when_planned(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    steps = {
        "trained": {"stage": "train", "student": "teacher", "data": ["documents", "signals"]}
        | {"max_steps": 2, "early_stopping": {"patience": 1, "every": 1}}
    }
    recipe: TinyRecipe = make_recipe(tmp_path, tiny_model, paragraphs[:4], more_steps=steps)
    (trained,) = (step for step in recipe.plan() if step.name == "trained")
    assert trained.identity["config"]["early_stopping"]["patience"] == 1
    error = error_of(recipe, "steps.documents.heldout_fraction=0")
    assert str(error).startswith(
        "steps.trained.early_stopping: it measures held-out rows, and step"
    )
    assert "early_stopping" not in TrainConfig(max_steps=1).settings()


def test_steps_that_would_never_be_measured_are_refused() -> None:
    values = {"max_steps": 5, "early_stopping": {"patience": 1, "every": 6}}
    with pytest.raises(ValidationError, match=r"every is 6 and max_steps 5: nothing would be"):
        TrainConfig.model_validate(values)
