"""The losses a student can be trained with: one a file, chosen by ``objective.loss``."""

from stages.student.objectives import bialign, cross_entropy, icl_distillation, kd
from stages.student.step import MakeTerms

OBJECTIVES: dict[str, MakeTerms] = {
    "cross_entropy": cross_entropy.terms,
    "kd": kd.terms,
    "bialign": bialign.terms,
    "icl_distillation": icl_distillation.terms,
}
