"""The papers' claims on in-context methods, and how each is judged: paired effects on episodes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from benchmarks.methods.in_context.methods import MEND
from benchmarks.methods.paired import paired_interval, verdict

JUDGED, ON_NOVEL = "judged", "novel"  # tasks of known classes, and of classes that none trains on

Array = npt.NDArray[Any]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """A paper's claim: one answers more episodes than another, or at most ``margin`` fewer."""

    paper: str
    said: str
    method: str
    baseline: str
    margin: float = 0.0


CLAIMS = (
    Claim("BiAlign", "BiAlign beats fine-tuning", "bialign", "fine_tuned"),
    Claim("BiAlign", "BiAlign beats output alignment", "bialign", "output_align"),
    Claim("BiAlign", "... and at equal compute", "bialign", "output_align_long"),
    Claim("BiAlign", "... with lambda 0.05", "bialign_005", "output_align"),
    Claim("ours", "... of clear pairs alone", "bialign_clear", "output_align"),
    Claim("ours", "lambda 0.05 is better than 1", "bialign_005", "bialign"),
    Claim("ours", "clear pairs are better than all", "bialign_clear", "bialign"),
    Claim("ours", "the KL averaged is better than summed", "bialign_mean", "bialign"),
    Claim("ours", "... averaged, with lambda 0.05", "bialign_mean_005", "bialign"),
    Claim("ICL-D", "Meta-ICT: ICL-D beats tuning", "distilled", "tuned"),
    Claim("ICL-D", "... on noisy answers", "noisy_distilled", "noisy_tuned"),
    Claim("ICL-D", "... for three times the steps", "long_distilled", "long_tuned"),
    Claim("ICL-D", "... with the LM term", "lm_distilled", "lm_tuned"),
    Claim("ICL-D", "Multitask-ICT: ICL-D beats tuning", "multi_distilled", "multi_tuned"),
    Claim("ICL-D", "... with the LM term, Multitask-ICT", "multi_lm_distilled", "multi_lm_tuned"),
    Claim("ICL-D", "Multitask-ICT beats Meta-ICT", "multi_lm_distilled", "lm_distilled"),
    Claim("ICL-D", "the LM term helps", "lm_distilled", "distilled"),
    Claim("ICL-D", "... and at equal compute", "lm_distilled", "long_distilled"),
    Claim("MEND", "vectors beat no demonstrations", MEND, "zero-shot"),
    Claim("MEND", "vectors beat as many positions of text", MEND, "fewer shots"),
    Claim("MEND", "vectors beat random vectors", MEND, "random vectors"),
    Claim("MEND", "at most 0.02 worse than all demonstrations", MEND, "all demonstrations", 0.02),
)


def effects(right: Mapping[str, Mapping[str, Array]], task_of_E: Array) -> list[Row]:
    """Return a row a claim: the paired differences of accuracy [S, E], and the verdict.

    The verdict is on held-out tasks of known classes; ``novel`` are those of novel ones. Intervals
    are over new episodes of these tasks, of ``over_tasks`` over other tasks of the known classes:
    ``task_of_E`` is which one an episode is of.
    """
    rows = []
    for claim in CLAIMS:
        judged_SE, novel_SE = (
            students[claim.method] - students[claim.baseline]
            for students in (right[JUDGED], right[ON_NOVEL])
        )
        effect, low, high = paired_interval(judged_SE)
        over_tasks = paired_interval(judged_SE, task_of_E)
        _, lowest, highest = over_tasks
        rows.append(
            {
                "paper": claim.paper,
                "claim": claim.said,
                "method": float(right[JUDGED][claim.method].mean()),
                "baseline": float(right[JUDGED][claim.baseline].mean()),
                "effect": effect,
                "low": low,
                "high": high,
                "over_tasks": over_tasks,
                "novel": paired_interval(novel_SE),
                "verdict": verdict(low + claim.margin, high + claim.margin),
                "verdict_over_tasks": verdict(lowest + claim.margin, highest + claim.margin),
            }
        )
    return rows
