"""The losses a student can be trained with: one a file, chosen by ``objective.loss``."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from stages.language_head import LanguageHead
from stages.student.chunked_loss import Objective
from stages.student.objectives import cross_entropy, kd

MakeObjective = Callable[[Any, Mapping[str, Tensor], LanguageHead | None], Objective]

OBJECTIVES: dict[str, MakeObjective] = {
    "cross_entropy": cross_entropy.objective,
    "kd": kd.objective,
}
