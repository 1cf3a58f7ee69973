"""The losses a student can be trained with: one a file, chosen by ``objective.loss``."""

from stages.student.objectives import (
    adpa,
    bialign,
    cross_entropy,
    dckd,
    dpo,
    icl_distillation,
    kd,
    sft,
)
from stages.student.step import MakeTerms

OBJECTIVES: dict[str, MakeTerms] = {
    "cross_entropy": cross_entropy.terms,
    "kd": kd.terms,
    "bialign": bialign.terms,
    "icl_distillation": icl_distillation.terms,
    "sft": sft.terms,
    "dpo": dpo.terms,
    "dckd": dckd.terms,
    "adpa": adpa.terms,
}
