"""What a student is trained for: an objective a file; ``ObjectiveConfig`` is the list of all."""

from typing import Annotated

from pydantic import Field

from stages.student.objectives.adpa import AdpaConfig
from stages.student.objectives.alm import AlmConfig
from stages.student.objectives.bialign import BiAlignConfig
from stages.student.objectives.cross_entropy import CrossEntropyConfig
from stages.student.objectives.dckd import DckdConfig
from stages.student.objectives.dpo import DpoConfig
from stages.student.objectives.icl_distillation import IclDistillationConfig
from stages.student.objectives.kd import KdConfig
from stages.student.objectives.mend import MendConfig
from stages.student.objectives.opd import OpdConfig
from stages.student.objectives.sft import SftConfig

ObjectiveConfig = Annotated[
    CrossEntropyConfig
    | KdConfig
    | AlmConfig
    | BiAlignConfig
    | IclDistillationConfig
    | SftConfig
    | DpoConfig
    | DckdConfig
    | AdpaConfig
    | OpdConfig
    | MendConfig,
    Field(discriminator="loss"),
]
