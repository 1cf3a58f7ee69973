"""Students from Python: made from a teacher, trained on finished tables, and what MEND leaves.

The train extra has what this needs (torch, transformers).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.student.distiller.vectors import read_vectors
    from stages.student.init.work import init_student
    from stages.student.objectives.cross_entropy import CrossEntropyConfig
    from stages.student.objectives.kd import KdConfig
    from stages.student.objectives.sft import SftConfig
    from stages.student.options import TrainOptions
    from stages.student.train.stage import TrainConfig
    from stages.student.train.work import TrainResult, train
else:
    from teachercache.own.stages.student.distiller.vectors import read_vectors
    from teachercache.own.stages.student.init.work import init_student
    from teachercache.own.stages.student.objectives.cross_entropy import CrossEntropyConfig
    from teachercache.own.stages.student.objectives.kd import KdConfig
    from teachercache.own.stages.student.objectives.sft import SftConfig
    from teachercache.own.stages.student.options import TrainOptions
    from teachercache.own.stages.student.train.stage import TrainConfig
    from teachercache.own.stages.student.train.work import TrainResult, train

__all__ = [
    "CrossEntropyConfig",
    "KdConfig",
    "SftConfig",
    "TrainConfig",
    "TrainOptions",
    "TrainResult",
    "init_student",
    "read_vectors",
    "train",
]
