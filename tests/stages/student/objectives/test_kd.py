"""Settings of ``kd``: what is refused, where, and what a recipe without them is called."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.errors import ConfigError
from stages.student.objectives.kd import KdConfig
from stages.student.train.stage import TrainStage

PLAIN = {"loss": "kd", "weight": 0.9}


@pytest.mark.parametrize("encoding", ["threshold", "threshold_tau", "top_k"])
@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"divergence": {"kind": "reverse_kl"}}, "asks for reverse_kl, which"),
        ({"temperature": 2.0}, "asks for forward_kl at temperature 2, which"),
        (
            {"divergence": {"kind": "total_variation"}, "temperature": 0.5},
            "asks for total_variation at temperature 0.5, which",
        ),
    ],
)
def test_other_encodings_are_refused_in_one_line(
    settings: dict[str, Any], asked: str, encoding: str
) -> None:
    config = KdConfig.model_validate(PLAIN | settings)
    tables = [("documents", ""), ("teacher_logits", encoding)]
    with pytest.raises(ConfigError) as error:
        config.require(tables, [])
    line = str(error.value)
    assert asked in line and f"of encoding {encoding}" in line and "\n" not in line
    config.require([("documents", ""), ("teacher_logits", "exact")], [])
    KdConfig.model_validate(PLAIN).require(tables, [])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"divergence": {"kind": "reverse_kl", "alpha": 0.1}}, "divergence.reverse_kl.alpha"),
        ({"divergence": {"kind": "skewed_kl", "beta": 0.1}}, "divergence.skewed_kl.beta"),
        ({"divergence": {"kind": "skewed_kl", "alpha": 0.0}}, "divergence.skewed_kl.alpha"),
        ({"divergence": {"kind": "jensen_shannon", "beta": 1}}, "divergence.jensen_shannon.beta"),
        ({"divergence": {"kind": "js"}}, "divergence"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        KdConfig.model_validate(PLAIN | settings)
    (problem,) = error.value.errors()
    assert ".".join(map(str, problem["loc"])) == said


def test_runs_that_leave_them_out_keep_their_names() -> None:
    """What is hashed of a plain ``kd`` is what was hashed before there were divergences."""
    body = {"stage": "train", "student": "s", "data": ["d"], "max_steps": 2}

    def hashed(**settings: Any) -> Any:
        objective = PLAIN | settings
        return TrainStage.model_validate(body | {"objective": objective}).hashed()["config"]

    assert hashed()["objective"] == PLAIN
    spelled = hashed(divergence={"kind": "forward_kl"}, temperature=1, positions=None)
    assert spelled["objective"] == PLAIN
    other = hashed(divergence={"kind": "skewed_kl"}, temperature=2)["objective"]
    assert other == PLAIN | {"divergence": {"kind": "skewed_kl", "alpha": 0.1}, "temperature": 2.0}
    at_some = hashed(positions={"by": "teacher_entropy"})["objective"]
    assert at_some == PLAIN | {"positions": {"by": "teacher_entropy", "fraction": 0.2}}
